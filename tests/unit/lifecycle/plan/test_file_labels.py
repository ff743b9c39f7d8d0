"""Which files of a container get its label."""

from pathlib import Path
from typing import Any, cast

from nodeagent.lifecycle.plan import file_labels
from nodeagent.requests import ContainerConfig, MountConfig
from nodeagent.sandbox.rootfs_defaults import bind, default_mounts
from nodeagent.sandbox.spec import ContainerPlan

LABEL = "system_u:object_r:container_file_t:s0:c1,c2"
POD = Path("/run/pod")


def test_what_is_made_for_a_container_and_what_is_asked_for() -> None:
    image = cast(Any, {**bind("", "/image"), "kind": "image"})
    made: dict[str, Any] = {
        "rootfs": {},
        "volumes": [{"source": "/volumes/0", "target": "/data"}],
        "mounts": [
            *default_mounts(False, {"cpu": ["cpu"], "unified": []}),
            bind("/run/pod/shm", "/dev/shm"),
            bind("/run/pod/hosts", "/etc/hosts"),
            bind("/run/podding", "/podding"),
            bind("/srv", "/srv"),
            bind("/volume", "/volume"),
            image,
        ],
    }
    config = ContainerConfig(
        name="c",
        image="i",
        mounts=(
            MountConfig(container_path="/volume", host_path="/volume", selinux_relabel=True),
            MountConfig(container_path="/srv", host_path="/srv"),
        ),
    )
    file_labels.assign(cast(ContainerPlan, made), config, POD, LABEL)
    assert made["rootfs"]["label"] == made["volumes"][0]["label"] == LABEL
    labelled = [mount["target"] for mount in made["mounts"] if mount.get("label") == LABEL]
    assert labelled == [
        "/dev",
        "/dev/pts",
        "/dev/mqueue",
        "/sys/fs/cgroup",
        "/dev/shm",
        "/etc/hosts",
        "/volume",
        "/image",
    ]


def test_memory_of_the_node_keeps_its_label() -> None:
    made: dict[str, Any] = {"rootfs": {}, "mounts": [bind("/dev/shm", "/dev/shm")]}
    config = ContainerConfig(name="c", image="i")
    file_labels.assign(cast(ContainerPlan, made), config, POD, LABEL)
    assert "label" not in made["mounts"][0]


def test_of_two_mounts_on_one_path_the_later_is_asked() -> None:
    made: dict[str, Any] = {"rootfs": {}, "mounts": [bind("/other", "/data")]}
    one = MountConfig(container_path="/data", host_path="/one", selinux_relabel=True)
    other = MountConfig(container_path="/data", host_path="/other")
    config = ContainerConfig(name="c", image="i", mounts=(one, other))
    file_labels.assign(cast(ContainerPlan, made), config, POD, LABEL)
    assert "label" not in made["mounts"][0]
