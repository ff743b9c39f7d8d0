"""Which kernel parameters a pod may set (CVE-2022-0811)."""

import pytest

from nodeagent.errors import InvalidArgument
from nodeagent.linux import sysctls

ALL = ("net", "ipc", "uts")


@pytest.mark.parametrize(
    "name",
    [
        "net.ipv4.ip_forward",
        "net.ipv4.conf.eth0/1.rp_filter",
        "net/ipv4/ip_forward",
        "net/ipv4/conf/eth0.1/rp_filter",
        "net.ipv4.conf.eth0:1@x.rp_filter",
        "kernel/sem",
        "kernel.msg_next_id",
        "fs/mqueue/msg_max",
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
        "net/../kernel/core_pattern",
        "net//ipv4",
        "net.ipv4.ip_forward+kernel.core_pattern",
        "net.ipv4.ip_forward=1+kernel.core_pattern",
        "/net/ipv4/ip_forward",
        "kernel/core_pattern",
        "kernel.shm_rmid_forced+x",
        "kernel.shmmax.x",
        "net.ipv4.x\ny",
        "net.ipv4.x y",
        "net.ipv4.ü",
        "net." + "x" * 300,
    ],
)
def test_anything_else_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument):
        sysctls.check({name: "1"}, ALL)


@pytest.mark.parametrize("value", ["", "4096\t87380\t6291456", "1 2", "1\n"])
def test_values_as_manifests_have_them(value: str) -> None:
    sysctls.check({"net.ipv4.tcp_rmem": value}, ALL)


def test_the_first_separator_separates() -> None:
    """sysctl(8): the other one is a dot in the name of an interface."""
    for name in ("net.ipv4.conf.eth0/1.rp_filter", "net/ipv4/conf/eth0.1/rp_filter"):
        assert sysctls.path_of(name) == "net/ipv4/conf/eth0.1/rp_filter"


@pytest.mark.parametrize("value", ["1\n2", "1\0", "x" * 2000, "ü"])
def test_values_are_plain(value: str) -> None:
    with pytest.raises(InvalidArgument, match="value"):
        sysctls.check({"net.ipv4.ip_forward": value}, ALL)


def test_a_namespace_that_is_the_nodes_is_left_alone() -> None:
    with pytest.raises(InvalidArgument, match="does not have"):
        sysctls.check({"net.ipv4.ip_forward": "1"}, ("ipc",))
    with pytest.raises(InvalidArgument, match="does not have"):
        sysctls.check({"kernel.sem": "1 1 1 1"}, ("net",))
