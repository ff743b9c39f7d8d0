"""hosts and resolv.conf."""

from nodeagent.lifecycle import podfiles
from nodeagent.records import DNS


def test_resolv_conf() -> None:
    dns = DNS(servers=("192.0.2.1", "192.0.2.2"), searches=("a", "b"), options=("ndots:3",))
    assert podfiles.resolv_conf(dns) == (
        "search a b\nnameserver 192.0.2.1\nnameserver 192.0.2.2\noptions ndots:3\n"
    )


def test_the_node_s_resolv_conf_without_dns() -> None:
    assert podfiles.resolv_conf(None) == podfiles.resolv_conf(DNS()) == ""


def test_hosts_has_every_address() -> None:
    text = podfiles.hosts("pod", ("10.1.2.3", "fd00::3"))
    assert text.endswith("10.1.2.3\tpod\nfd00::3\tpod\n")
    assert text.startswith("127.0.0.1\tlocalhost\n")
