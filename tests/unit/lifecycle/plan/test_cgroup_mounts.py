"""Which mounts show a container its cgroups."""

import msgspec
import pytest

from nodeagent.errors import InvalidArgument, Unsupported
from nodeagent.lifecycle.plan import cgroup_mounts
from nodeagent.requests import ContainerConfig, Namespaces
from nodeagent.sandbox import rootfs_defaults
from nodeagent.sandbox.spec import Mount

V1 = {"cpu": ["cpu"], "systemd": ["name=systemd"]}
V2: dict[str, list[str]] = {"": []}
PLAIN = ContainerConfig(name="main", image="busybox")
WRITABLE = msgspec.structs.replace(PLAIN, cgroup_mount="writable")
ON_NODE = msgspec.structs.replace(PLAIN, namespaces=Namespaces(cgroup="node"))


def shown(config: ContainerConfig, hierarchies: dict[str, list[str]]) -> list[Mount]:
    """The mounts at /sys/fs/cgroup and below."""
    defaults = rootfs_defaults.default_mounts(config.privileged, hierarchies)
    mounts = cgroup_mounts.requested(defaults, config)
    others = [mount for mount in defaults if not mount["target"].startswith(cgroup_mounts.PLACE)]
    assert [mount for mount in mounts if mount in others] == others
    return [mount for mount in mounts if mount not in others]


def test_the_default_is_readonly() -> None:
    for config in (PLAIN, msgspec.structs.replace(PLAIN, cgroup_mount="readonly")):
        [mount] = shown(config, V2)
        assert (mount["source"], "ro" in mount["attributes"]) == ("cgroup2", True)


def test_what_may_be_managed_is_writable() -> None:
    [mount] = shown(WRITABLE, V2)
    assert mount["source"] == "cgroup2"
    assert mount["attributes"] == ["nosuid", "nodev", "noexec", "relatime"]


@pytest.mark.parametrize("hierarchies", [V1, V2])
def test_the_nodes_are_a_bind_of_what_the_node_has(hierarchies: dict[str, list[str]]) -> None:
    """A new mount in the node's namespace would take options like nsdelegate away from the node."""
    [mount] = shown(ON_NODE, hierarchies)
    assert (mount["kind"], mount["source"], mount["recursive"]) == ("bind", "/sys/fs/cgroup", True)
    assert "ro" in mount["attributes"]
    [mount] = shown(msgspec.structs.replace(ON_NODE, privileged=True), hierarchies)
    assert "ro" not in mount["attributes"]


def test_what_the_request_mounts_there_is_left_alone() -> None:
    asked = [rootfs_defaults.bind("/srv", "/sys/fs/cgroup")]
    assert cgroup_mounts.requested(asked, ON_NODE) == asked
    with pytest.raises(InvalidArgument, match="a mount of the request covers"):
        cgroup_mounts.requested(asked, WRITABLE)
    privileged = msgspec.structs.replace(WRITABLE, privileged=True)
    assert cgroup_mounts.requested(asked, privileged) == asked


def test_without_delegation_nothing_is_given_to_manage() -> None:
    cgroup_mounts.check(WRITABLE, delegates=True)
    cgroup_mounts.check(PLAIN, delegates=False)
    cgroup_mounts.check(msgspec.structs.replace(WRITABLE, privileged=True), delegates=False)
    with pytest.raises(Unsupported, match="cgroup_mount_mode: read-write needs"):
        cgroup_mounts.check(WRITABLE, delegates=False)
