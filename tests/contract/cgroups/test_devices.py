"""Device rules, as a process in the group meets them."""

import os

import pytest

from nodeagent.cgroups.devices import DEFAULT_RULES, Rule
from nodeagent.cgroups.group import Cgroup
from nodeagent.errors import Unsupported
from tests.contract.cgroups.conftest import Spawn

KMSG = "/dev/kmsg"


@pytest.fixture
def devices(group: Cgroup) -> Cgroup:
    try:
        group.set_devices(None)
    except Unsupported as error:
        pytest.skip(str(error))
    return group


def opens(spawn: Spawn, group: Cgroup, path: str) -> bool:
    process = spawn(
        group, f"try: open({path!r}, 'rb'); print('yes')\nexcept PermissionError: print('no')"
    )
    return process.communicate()[0] == b"yes\n"


def test_defaults(devices: Cgroup, spawn: Spawn) -> None:
    devices.set_devices(DEFAULT_RULES)
    assert opens(spawn, devices, "/dev/zero")
    assert opens(spawn, devices, "/dev/urandom")
    assert not opens(spawn, devices, KMSG)


def test_a_device_more(devices: Cgroup, spawn: Spawn) -> None:
    devices.set_devices([*DEFAULT_RULES, Rule("c", 1, 11, "r")])
    assert opens(spawn, devices, KMSG)
    devices.set_devices(DEFAULT_RULES)
    assert not opens(spawn, devices, KMSG)


def test_all(devices: Cgroup, spawn: Spawn) -> None:
    assert opens(spawn, devices, KMSG)
    devices.set_devices([])
    assert not opens(spawn, devices, "/dev/zero")
    devices.set_devices(None)
    assert opens(spawn, devices, KMSG)


def test_any_node_may_be_made_but_not_used(
    devices: Cgroup, spawn: Spawn, tmp_path: os.PathLike[str]
) -> None:
    devices.set_devices(DEFAULT_RULES)
    node = os.path.join(tmp_path, "kmsg")
    made = spawn(devices, f"import os; os.mknod({node!r}, 0o20600, os.makedev(1, 11))")
    assert made.wait(5) == 0
    assert not opens(spawn, devices, node)


def test_an_exec_has_the_rules_of_its_container(devices: Cgroup, spawn: Spawn) -> None:
    devices.set_devices(DEFAULT_RULES)
    exec_group = devices.child("exec")
    process = spawn(
        exec_group, f"try: open({KMSG!r}, 'rb'); print('yes')\nexcept PermissionError: print('no')"
    )
    assert process.communicate()[0] == b"no\n"
