from nodeagent.net.nftables import NFPROTO_BRIDGE, Table
from nodeagent.net.spoofing import SpoofFilter, elements
from nodeagent.records import Lease

LINK = "nv0a1b2c3d00001"
DUAL = Lease(
    pod_id="a", link=LINK, addresses=("10.88.0.5/16", "fd00::5/64"), acquired_at=1, released_at=0
)
KEY = LINK.encode().hex() + "00" + "0a6e0a580005" + "0000"


def test_each_address_goes_with_port_and_mac_address() -> None:
    assert [(element.set, element.key.hex()) for element in elements(DUAL)] == [
        ("ipv4", KEY + "0a580005"),
        ("ipv6", KEY + "fd000000000000000000000000000005"),
        ("ipv6", KEY + "fe80000000000000086e0afffe580005"),
    ]


def test_pod_of_one_family_is_in_no_other_set() -> None:
    pod4 = Lease(pod_id="a", link=LINK, addresses=("10.88.0.5/16",), acquired_at=1)
    assert [element.set for element in elements(pod4)] == ["ipv4"]
    pod6 = Lease(pod_id="a", link=LINK, addresses=("fd00::5/64",), acquired_at=1)
    assert [element.set for element in elements(pod6)] == ["ipv6", "ipv6"]


def test_declaration_replaces_the_table_and_adds_elements_last() -> None:
    declaration = SpoofFilter(table=Table("t", NFPROTO_BRIDGE), link_prefix="nv0a1b2c3d")
    said = [request.what for request in declaration.declare(list(elements(DUAL)))]
    assert said[:3] == [f"nft table bridge t: {verb}" for verb in ("create", "delete", "create")]
    assert said[-2:] == ["nft table bridge t: add to ipv4", "nft table bridge t: add to ipv6"]
