"""Addresses and subnets: pure functions on the standard library's types."""

from __future__ import annotations

from collections.abc import Collection
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_interface,
    ip_network,
)

from nodeagent.errors import InvalidArgument, ResourceExhausted

Address = IPv4Address | IPv6Address
Interface = IPv4Interface | IPv6Interface
Subnet = IPv4Network | IPv6Network

MIN_SUBNET_SIZE = 4

_PRIVATE = (IPv4Network("10.0.0.0/8"), IPv4Network("172.16.0.0/12"), IPv4Network("192.168.0.0/16"))
_CHOSEN_PREFIXLEN = 20

# Locally administered, as RFC 7042, section 2.1 has it.
_POD_MAC_PREFIX = b"\x0a\x6e"
_BRIDGE_MAC_PREFIX = b"\x0a\x6f"


def gateway(subnet: Subnet) -> Interface:
    """The node's own address in a subnet of pods, which is the first one."""
    return ip_interface(f"{subnet[1]}/{subnet.prefixlen}")


def overlaps(one: Subnet, other: Subnet) -> bool:
    return one.version == other.version and one.overlaps(other)


def free_subnet(taken: Collection[Subnet], seed: int) -> IPv4Network:
    """A private subnet of 4096 addresses that overlaps none of the given ones; `seed` decides which."""
    candidates = [c for private in _PRIVATE for c in private.subnets(new_prefix=_CHOSEN_PREFIXLEN)]
    start = seed % len(candidates)
    for candidate in candidates[start:] + candidates[:start]:
        if not any(overlaps(candidate, other) for other in taken):
            return candidate
    raise ResourceExhausted(
        "network: this node's routes leave no private /20 for pods; set network.subnet4"
    )


def parse_pod_cidr(text: str) -> tuple[Subnet, ...]:
    """The subnets of an UpdateRuntimeConfig: one, or one of each family with a comma between."""
    try:
        subnets = tuple(ip_network(part.strip()) for part in text.split(","))
    except ValueError as error:
        raise InvalidArgument(f'pod_cidr "{text}": {error}') from None
    if len({subnet.version for subnet in subnets}) < len(subnets):
        raise InvalidArgument(f'pod_cidr "{text}": has two subnets of one family')
    if any(subnet.num_addresses < MIN_SUBNET_SIZE for subnet in subnets):
        raise InvalidArgument(f'pod_cidr "{text}": a subnet needs {MIN_SUBNET_SIZE} addresses')
    return subnets


def mac_of(address: Interface) -> bytes:
    """The MAC address of a pod goes with its address, so that neighbours' caches stay right when it is used again."""
    return _POD_MAC_PREFIX + address.packed[-4:]


def mac_of_bridge(instance: str) -> bytes:
    """The MAC address by which an agent knows its bridge. instance: eight hexadecimal digits."""
    return _BRIDGE_MAC_PREFIX + bytes.fromhex(instance)


def link_local(mac: bytes) -> IPv6Interface:
    """The IPv6 link-local address of a MAC address (RFC 4291, appendix A)."""
    identifier = bytes([mac[0] ^ 0x02, *mac[1:3], 0xFF, 0xFE, *mac[3:]])
    return IPv6Interface((b"\xfe\x80" + bytes(6) + identifier, 64))
