from ipaddress import ip_interface, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.errors import InvalidArgument, ResourceExhausted
from nodeagent.net import addresses

ROUTES = st.lists(
    st.builds(
        lambda base, length: ip_network((base, length), strict=False),
        st.sampled_from(["10.0.0.0", "10.88.0.0", "172.16.0.0", "192.168.0.0"]),
        st.integers(9, 24),
    ),
    max_size=8,
)


@pytest.mark.parametrize(
    ("subnet", "gateway"),
    [("10.88.0.0/16", "10.88.0.1/16"), ("10.1.2.4/30", "10.1.2.5/30"), ("fd00::/64", "fd00::1/64")],
)
def test_gateway_is_the_first_address(subnet: str, gateway: str) -> None:
    assert addresses.gateway(ip_network(subnet)) == ip_interface(gateway)


@given(ROUTES, st.integers(0, 1 << 32))
def test_free_subnet_is_private_and_free(taken: list[addresses.Subnet], seed: int) -> None:
    subnet = addresses.free_subnet(taken, seed)
    assert subnet.is_private
    assert subnet.num_addresses == 4096
    assert not any(subnet.overlaps(route) for route in taken)


def test_free_subnet_differs_by_seed() -> None:
    assert len({addresses.free_subnet([], seed) for seed in range(100)}) == 100


def test_no_free_subnet_is_told() -> None:
    taken = [ip_network(n) for n in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")]
    with pytest.raises(ResourceExhausted, match="routes"):
        addresses.free_subnet(taken, 7)


def test_families_do_not_overlap() -> None:
    assert not addresses.overlaps(ip_network("0.0.0.0/0"), ip_network("::/0"))
    assert addresses.overlaps(ip_network("10.0.0.0/8"), ip_network("10.88.0.0/16"))


def test_pod_cidr_of_one_or_two_families() -> None:
    assert addresses.parse_pod_cidr("10.1.0.0/24") == (ip_network("10.1.0.0/24"),)
    assert addresses.parse_pod_cidr("fd00::/64, 10.1.0.0/24") == (
        ip_network("fd00::/64"),
        ip_network("10.1.0.0/24"),
    )


@pytest.mark.parametrize(
    "text", ["", ",", "10.1.0.1/24", "10.1.0.0/24,10.2.0.0/24", "10.1.0.0/31", "fd00::/127", "a"]
)
def test_malformed_pod_cidr_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="pod_cidr"):
        addresses.parse_pod_cidr(text)


def test_mac_follows_the_address() -> None:
    mac = addresses.mac_of(ip_interface("10.88.1.2/16"))
    assert mac.hex(":") == "0a:6e:0a:58:01:02"
    assert addresses.mac_of_bridge("0a580102") != mac


def test_link_local_follows_the_mac() -> None:
    # The example of RFC 4291, appendix A, with the universal bit as there.
    mac = bytes.fromhex("34567890abcd")
    assert str(addresses.link_local(mac)) == "fe80::3656:78ff:fe90:abcd/64"
