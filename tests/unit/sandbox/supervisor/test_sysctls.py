"""How the groups of a sysctl are told in the node's user namespace."""

import pytest

from nodeagent.errors import InvalidArgument
from nodeagent.linux.userns import Extent
from nodeagent.sandbox.supervisor import sysctls


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("0 0", "200000 200000"),
        ("0\t9", "200000 200009"),
        ("0 2147483647", "200000 265535"),
        ("1 0", "1 0"),
        ("nonsense", "nonsense"),
    ],
)
@pytest.mark.parametrize("name", ["net.ipv4.ping_group_range", "net/ipv4/ping_group_range"])
def test_groups_are_written_as_the_pod_s(name: str, value: str, written: str) -> None:
    groups = [Extent(0, 200_000, 65_536)]
    assert sysctls._outside(name, value, groups) == written
    assert sysctls._outside(name, value, ()) == value
    assert sysctls._outside("net.ipv4.tcp_rmem", value, groups) == value


def test_groups_that_the_pod_has_not_got_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="group 70000 is not mapped"):
        sysctls._outside("net.ipv4.ping_group_range", "70000 70001", [Extent(0, 200_000, 65_536)])
