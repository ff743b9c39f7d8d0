from collections.abc import Sequence
from ipaddress import ip_address, ip_network

import pytest

from nodeagent.net.addresses import Address
from nodeagent.net.nftables import Table
from nodeagent.net.ruleset import Ruleset, elements
from nodeagent.records import HostPort

POD4, POD6 = ip_address("10.88.0.5"), ip_address("fd00::5")


def port(host_ip: str = "", protocol: str = "tcp") -> HostPort:
    return HostPort(
        protocol=protocol, host_ip=host_ip, host_port=80, pod_id="a", container_port=8080
    )


@pytest.mark.parametrize(
    ("host_ip", "addresses", "sets"),
    [
        ("", (POD4, POD6), ["any4", "any6"]),
        ("", (POD4,), ["any4"]),
        ("0.0.0.0", (POD4, POD6), ["any4"]),
        ("::", (POD4, POD6), ["any6"]),
        ("192.0.2.1", (POD4, POD6), ["bound4"]),
        ("fd00::1", (POD4, POD6), ["bound6"]),
    ],
)
def test_port_is_in_the_maps_of_its_addresses(
    host_ip: str, addresses: Sequence[Address], sets: list[str]
) -> None:
    assert [element.set for element in elements(port(host_ip), addresses)] == sets


def test_key_and_datum_fill_whole_registers() -> None:
    (element,) = elements(port(protocol="sctp"), [POD4])
    assert element.key.hex() == "84000000" + "00500000"
    assert element.data.hex() == "0a580005" + "1f900000"
    (element,) = elements(port("192.0.2.1", "udp"), [POD4])
    assert element.key.hex() == "c0000201" + "11000000" + "00500000"


def test_declaration_replaces_the_table_and_adds_elements_last() -> None:
    ruleset = Ruleset(
        table=Table("t"),
        bridge="na0",
        subnets=(ip_network("10.88.0.0/16"),),
        masquerade=True,
        host_ports=True,
    )
    said = [request.what for request in ruleset.declare(list(elements(port(), [POD4])))]
    assert said[:3] == [f"nft table inet t: {verb}" for verb in ("create", "delete", "create")]
    assert said[-1] == "nft table inet t: add to any4"
    assert not any("6" in what for what in said)
