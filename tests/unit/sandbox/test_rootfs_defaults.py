"""The default mounts, as data."""

import pytest

from nodeagent.sandbox import rootfs_defaults

V2: dict[str, list[str]] = {"": []}
HYBRID: dict[str, list[str]] = {"cpu": ["cpu"], "systemd": ["none", "name=systemd"], "unified": []}


def targets(privileged: bool, hierarchies: dict[str, list[str]]) -> list[str]:
    return [mount["target"] for mount in rootfs_defaults.default_mounts(privileged, hierarchies)]


@pytest.mark.parametrize("hierarchies", [V2, HYBRID])
def test_parents_come_first(hierarchies: dict[str, list[str]]) -> None:
    found = targets(False, hierarchies)
    for target in found:
        assert not [late for late in found[found.index(target) :] if target.startswith(f"{late}/")]
    assert len(set(found)) == len(found)


def test_cgroups_of_version_2() -> None:
    (mount,) = (m for m in rootfs_defaults.default_mounts(False, V2) if "cgroup" in m["target"])
    assert mount["source"] == "cgroup2"
    assert mount["attributes"] == ["ro", "nosuid", "nodev", "noexec", "relatime"]


def test_cgroups_of_a_hybrid_node() -> None:
    top, *below = (
        m for m in rootfs_defaults.default_mounts(False, HYBRID) if "cgroup" in m["target"]
    )
    assert (top["source"], top["data"]) == ("tmpfs", {"mode": "755"})
    assert [(m["target"], m["source"], m["data"]) for m in below] == [
        ("/sys/fs/cgroup/cpu", "cgroup", {"cpu": ""}),
        ("/sys/fs/cgroup/systemd", "cgroup", {"none": "", "name": "systemd"}),
        ("/sys/fs/cgroup/unified", "cgroup2", {}),
    ]


def test_privileged_containers_may_write_to_sysfs_and_cgroups() -> None:
    def read_only(privileged: bool) -> set[str]:
        mounts = rootfs_defaults.default_mounts(privileged, V2)
        return {mount["target"] for mount in mounts if "ro" in mount["attributes"]}

    assert read_only(False) == {"/sys", "/sys/fs/cgroup"}
    assert read_only(True) == set()


def test_descriptions() -> None:
    assert (
        rootfs_defaults.describe(rootfs_defaults.filesystem("/proc", "proc", "")) == "proc on /proc"
    )
    assert rootfs_defaults.describe(rootfs_defaults.bind("/host", "/data")) == "/host on /data"
    assert rootfs_defaults.describe(rootfs_defaults.bind("", "/data")) == "image on /data"
