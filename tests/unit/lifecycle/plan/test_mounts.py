"""The order and the overriding of mounts."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from nodeagent.errors import InvalidArgument
from nodeagent.lifecycle.plan.mounts import (
    MASKED_PATHS,
    container_mounts,
    image_volumes,
    masked_paths,
)
from nodeagent.records import Sandbox
from nodeagent.requests import ContainerConfig, MountConfig, Namespaces, SandboxConfig
from nodeagent.sandbox.spec import Mount

POD = Path("/run/pod")


def mounts(
    *wanted: MountConfig,
    namespaces: Namespaces | None = None,
    rejected: Collection[str] = (),
    **fields: object,
) -> list[Mount]:
    sandbox = Sandbox(
        id="s",
        config=SandboxConfig(
            name="n", uid="u", namespace="ns", namespaces=namespaces or Namespaces()
        ),
        cgroup_parent="/p",
        boot_id="b",
        created_at=1,
    )
    config = ContainerConfig(name="c", image="i", mounts=wanted, **fields)  # type: ignore[arg-type]
    return container_mounts(
        sandbox,
        config,
        POD,
        {"": []},
        lambda _: [Path("/layer")],
        rejected=rejected,
    )


def of(plan: list[Mount], target: str) -> Mount:
    (found,) = (mount for mount in plan if mount["target"] == target)
    return found


def test_parents_come_first() -> None:
    plan = mounts(
        MountConfig(container_path="/data/deep", host_path="/b"),
        MountConfig(container_path="/data", host_path="/a"),
    )
    targets = [mount["target"] for mount in plan]
    assert targets.index("/data") < targets.index("/data/deep")
    assert targets.index("/dev") < targets.index("/dev/shm")


def test_the_caller_s_mount_replaces_the_default() -> None:
    plan = mounts(MountConfig(container_path="/etc/hosts", host_path="/kubelet/hosts"))
    assert of(plan, "/etc/hosts")["source"] == "/kubelet/hosts"
    assert of(plan, "/etc/hostname")["source"] == "/run/pod/hostname"


def test_thermal_counters_are_masked_where_there_are_any(tmp_path: Path) -> None:
    for name in ("cpu0", "cpu12", "cpufreq"):
        (tmp_path / "devices/system/cpu" / name / "thermal_throttle").mkdir(parents=True)
    (tmp_path / "devices/system/cpu/cpu1").mkdir()
    assert masked_paths(tmp_path)[len(MASKED_PATHS) :] == (
        "/sys/devices/system/cpu/cpu0/thermal_throttle",
        "/sys/devices/system/cpu/cpu12/thermal_throttle",
    )


def targets(plan: list[Mount]) -> list[str]:
    return [mount["target"] for mount in plan]


DEFAULTS = ["/proc", "/dev", "/dev/pts", "/dev/mqueue", "/sys", "/sys/fs/cgroup", "/dev/shm"]
FILES = ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"]


def test_what_is_asked_for_comes_last() -> None:
    asked = ("/a", "/sys/fs/bpf", "/dev/null", "/z")
    plan = mounts(*(MountConfig(container_path=path, host_path="/h") for path in asked))
    assert targets(plan) == [*DEFAULTS, "/a", "/z", *FILES, "/dev/null", "/sys/fs/bpf"]


@pytest.mark.parametrize("propagation", ["private", "slave", "shared"])
@pytest.mark.parametrize(
    ("path", "left_out"),
    [
        ("/sys", ["/sys", "/sys/fs/cgroup"]),
        ("/sys/fs", ["/sys/fs/cgroup"]),
        ("/sys/fs/cgroup", ["/sys/fs/cgroup"]),
        ("/sys/fs/bpf", []),
        ("/dev", ["/dev", "/dev/pts", "/dev/mqueue", "/dev/shm"]),
        ("/dev/shm", ["/dev/shm"]),
        ("/dev/sh", []),
        ("/proc", ["/proc"]),
        ("/run", []),
        ("/var", []),
    ],
)
def test_no_default_at_or_below_what_is_asked_for(
    path: str, left_out: list[str], propagation: Any
) -> None:
    wanted = MountConfig(container_path=path, host_path="/h", propagation=propagation)
    defaults = [mount for mount in mounts(wanted) if mount["source"] != "/h"]
    expected = [target for target in DEFAULTS if target not in left_out]
    assert [target for target in targets(defaults) if target not in FILES] == expected


@pytest.mark.parametrize(
    ("propagation", "found"), [("private", FILES), ("slave", FILES), ("shared", [])]
)
def test_the_pod_s_files_are_in_a_volume_at_etc_unless_that_is_shared_with_the_node(
    propagation: Any, found: list[str]
) -> None:
    wanted = MountConfig(container_path="/etc", host_path="/h", propagation=propagation)
    plan = targets(mounts(wanted))
    assert plan[plan.index("/etc") :] == ["/etc", *found]
    assert [target for target in plan if target in FILES] == found


def test_of_two_mounts_on_one_path_the_later_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    plan = mounts(
        MountConfig(container_path="/data", host_path="/a"),
        MountConfig(container_path="/other", host_path="/o"),
        MountConfig(container_path="/data/", host_path="/b"),
    )
    assert of(plan, "/data")["source"] == "/b"
    assert '"/data" is mounted twice; the later mount is taken' in caplog.text


def test_a_path_writes_no_line_into_the_log(caplog: pytest.LogCaptureFixture) -> None:
    twice = MountConfig(container_path="/data\nERROR forged", host_path="/a")
    mounts(twice, twice)
    assert [record.getMessage() for record in caplog.records if "\n" in record.getMessage()] == []


def test_an_absent_host_path_is_made_but_for_those_that_are_listed() -> None:
    plan = mounts(
        MountConfig(container_path="/a", host_path="/h/a"),
        MountConfig(container_path="/b", host_path="/h/b"),
        MountConfig(container_path="/c", host_path="/h/c", must_exist=True),
        MountConfig(container_path="/d", image="sha256:1"),
        rejected=("/h/b",),
    )
    absent = {mount["target"]: mount.get("absent") for mount in plan}
    assert [absent[target] for target in ("/a", "/b", "/c", "/d", "/etc/hosts", "/dev/shm")] == [
        "make",
        "reject",
        *[None] * 4,
    ]


def volumes(*names: str, asked: Collection[str] = ()) -> list[str]:
    """The targets of the volumes of an image."""
    plan = mounts(*(MountConfig(container_path=path, host_path="/h") for path in asked))
    made = image_volumes(names, Path("/container"), plan)
    assert len({volume["source"] for volume in made}) == len(made)
    assert all(volume["source"].startswith("/container/volumes/") for volume in made)
    return [volume["target"] for volume in made]


def test_volumes_of_the_image_have_their_parents_first() -> None:
    names = ("/data/deep", "/data/", "relative/../b", "/etc", "/data")
    assert volumes(*names, asked=["/data/asked"]) == ["/b", "/data", "/etc", "/data/deep"]


def test_volumes_of_the_image_that_something_else_is_mounted_over_are_left_out() -> None:
    names = ("/data", "/data/deep", "/var", "/", "", "/proc", "/sys/fs", "/dev/shm/x", "/var/x/y")
    assert volumes(*names, asked=["/data", "/var/x"]) == ["/var"]


def test_the_volumes_of_an_image_have_a_bound() -> None:
    with pytest.raises(InvalidArgument, match="257 volumes"):
        volumes(*(f"/{number}" for number in range(257)))


def test_shared_memory_follows_the_ipc_namespace() -> None:
    assert of(mounts(), "/dev/shm")["source"] == "/run/pod/shm"
    assert of(mounts(namespaces=Namespaces(ipc="node")), "/dev/shm")["source"] == "/dev/shm"


def test_image_volumes_are_read_only() -> None:
    plan = mounts(MountConfig(container_path="/v", image="sha256:1", image_sub_path="a/b"))
    volume = of(plan, "/v")
    assert (volume["kind"], volume["lower"], volume["sub_path"]) == ("image", ["/layer"], "a/b")
    assert "ro" in volume["attributes"]


def test_options_and_recursive_read_only() -> None:
    wanted = MountConfig(
        container_path="/v",
        host_path="/h",
        readonly=True,
        recursive_read_only=True,
        options=("noexec",),
    )
    volume = of(mounts(wanted), "/v")
    assert set(volume["attributes"]) == {"ro", "noexec"}
    assert volume["recursive"]


def test_pod_files_are_read_only_with_the_root() -> None:
    assert "ro" in of(mounts(readonly_rootfs=True), "/etc/hosts")["attributes"]
    assert "ro" not in of(mounts(), "/etc/hosts")["attributes"]
