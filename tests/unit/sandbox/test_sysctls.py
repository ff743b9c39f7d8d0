"""Which kernel parameters a pod may set (CVE-2022-0811)."""

import pytest

from nodeagent.errors import InvalidArgument
from nodeagent.sandbox import sysctls

ALL = ("net", "ipc", "uts")


@pytest.mark.parametrize(
    "name",
    [
        "net.ipv4.ip_forward",
        "net.ipv4.conf.eth0/1.rp_filter",
        "kernel.shm_rmid_forced",
        "kernel.msgmax",
        "kernel.sem",
        "kernel.auto_msgmni",
        "kernel.domainname",
        "fs.mqueue.msg_max",
    ],
)
def test_parameters_of_the_pods_namespaces(name: str) -> None:
    sysctls.check({name: "1"}, ALL)


@pytest.mark.parametrize(
    "name",
    [
        "kernel.core_pattern",
        "kernel.semaphore",
        "kernel.hostname",
        "vm.overcommit_memory",
        "fs.file-max",
        "net",
        "net.",
        "",
        ".net.ipv4",
        "net...kernel.core_pattern",
        "net.//.//.kernel.core_pattern",
        "net./.x",
        "net.ipv4.x\ny",
        "net.ipv4.x y",
        "net.ipv4.ü",
        "net." + "x" * 300,
    ],
)
def test_anything_else_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument):
        sysctls.check({name: "1"}, ALL)


@pytest.mark.parametrize("value", ["1\n2", "1\0", "x" * 2000, "ü"])
def test_values_are_plain(value: str) -> None:
    with pytest.raises(InvalidArgument, match="value"):
        sysctls.check({"net.ipv4.ip_forward": value}, ALL)


def test_a_namespace_that_is_the_nodes_is_left_alone() -> None:
    with pytest.raises(InvalidArgument, match="not of a namespace"):
        sysctls.check({"net.ipv4.ip_forward": "1"}, ("ipc",))
    with pytest.raises(InvalidArgument, match="not of a namespace"):
        sysctls.check({"kernel.sem": "1 1 1 1"}, ("net",))
