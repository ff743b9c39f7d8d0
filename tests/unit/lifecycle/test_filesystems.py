"""The order and the overriding of mounts."""

from pathlib import Path

import pytest

from nodeagent.errors import InvalidArgument
from nodeagent.lifecycle.filesystems import MASKED_PATHS, container_mounts, masked_paths
from nodeagent.records import ContainerConfig, MountConfig, Namespaces, Sandbox, SandboxConfig
from nodeagent.sandbox.spec import Mount

POD = Path("/run/pod")


def mounts(
    *wanted: MountConfig, namespaces: Namespaces | None = None, **fields: object
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
    return container_mounts(sandbox, config, POD, {"": []}, lambda _: [Path("/layer")])


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


def test_one_path_twice_is_refused() -> None:
    twice = MountConfig(container_path="/data", host_path="/a")
    with pytest.raises(InvalidArgument, match='"/data" is mounted twice'):
        mounts(twice, twice)


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
