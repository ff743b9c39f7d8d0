"""The agent's own nf_tables table: masquerade, and the ports of the node that are forwarded to pods.

::

    table inet nodeagent_0a1b2c3d
        map bound4      node address . protocol . port  →  pod address . port      (likewise bound6)
        map any4                       protocol . port  →  pod address . port      (likewise any6)
        set node4       addresses of the node that pods have asked                 (likewise node6)

        chain guard        raw: from the bridge nothing may come to or from 127.0.0.0/8
        chain prerouting   to an address of the node, but not 127.0.0.0/8 → chain publish
        chain output       the same, for what the node itself sends
        chain publish      destination NAT by the maps
        chain postrouting  source NAT: see `_postrouting`

The table is declared whole, in one transaction; a pod's ports come and go as elements. It has no filter but the guard:
what other tables drop stays dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address

from nodeagent.net import nftables as nft
from nodeagent.net.addresses import Address, Subnet
from nodeagent.net.netlink import Request
from nodeagent.net.nftables import Chain, Element, Load, Set, Table
from nodeagent.records import HostPort

# of nft(8): priorities by name
_RAW = -300
_DSTNAT = -100
_SRCNAT = 100

_PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}


@dataclass(frozen=True, slots=True)
class Family:
    """The types and fields that differ between IPv4 and IPv6."""

    version: int
    nfproto: int
    address: nft.DataType
    saddr: Load
    daddr: Load
    original_daddr: Load

    def is_(self) -> bytes:
        return nft.equal(nft.NFPROTO, bytes([self.nfproto]))

    def from_(self, subnet: Subnet) -> bytes:
        return nft.within(self.saddr, subnet.network_address.packed, subnet.prefixlen)

    def to(self, subnet: Subnet) -> bytes:
        return nft.within(self.daddr, subnet.network_address.packed, subnet.prefixlen)


_IPV4 = Family(
    4,
    nft.NFPROTO_IPV4,
    nft.IPV4_ADDR,
    nft.IP_SADDR,
    nft.IP_DADDR,
    nft.CT_ORIGINAL_IP_DADDR,
)
_IPV6 = Family(
    6,
    nft.NFPROTO_IPV6,
    nft.IPV6_ADDR,
    nft.IP6_SADDR,
    nft.IP6_DADDR,
    nft.CT_ORIGINAL_IP6_DADDR,
)
_FAMILIES = {4: _IPV4, 6: _IPV6}
_TO_NODE = nft.equal(nft.FIB_DADDR_TYPE, nft.RTN_LOCAL)
_LOOPBACK4 = IPv4Network("127.0.0.0/8")
_LOOPBACK6 = IPv6Network("::1/128")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ruleset:
    """The declaration of the table. subnets: of the pods."""

    table: Table
    bridge: str
    subnets: tuple[Subnet, ...]
    masquerade: bool
    host_ports: bool

    def declare(self, elements: Sequence[Element]) -> list[Request]:
        """The requests that replace the table, whether it exists or not, by a new one with these elements."""
        held = elements if self.host_ports else ()
        return self.table.replace(self.sets(), self._chains(), self._rules(), held)

    def _families(self) -> list[Family]:
        return [_FAMILIES[version] for version in sorted({s.version for s in self.subnets})]

    def sets(self) -> Iterator[Set]:
        """The sets and maps; none where no port of the node is forwarded."""
        if not self.host_ports:
            return
        for family in self._families():
            target = (family.address, nft.INET_SERVICE)
            port = (nft.INET_PROTO, nft.INET_SERVICE)
            yield Set(f"bound{family.version}", (family.address, *port), target)
            yield Set(f"any{family.version}", port, target)
            yield Set(f"node{family.version}", (family.address,), dynamic=True)

    def _chains(self) -> Iterator[Chain]:
        yield Chain("postrouting", "nat", "postrouting", _SRCNAT)
        if self.host_ports:
            yield Chain("guard", "filter", "prerouting", _RAW)
            yield Chain("publish")
            yield Chain("prerouting", "nat", "prerouting", _DSTNAT)
            yield Chain("output", "nat", "output", _DSTNAT)

    def _rules(self) -> Iterator[tuple[str, tuple[bytes, ...]]]:
        if self.host_ports:
            yield from (("guard", rule) for rule in self._guard())
            yield from (("publish", rule) for rule in self._publish())
            # The kernel drops what comes from elsewhere to 127.0.0.1, unless it is translated before: a port that is
            # published on loopback only would be open to the node's neighbours.
            yield "prerouting", (_IPV4.is_(), _IPV4.to(_LOOPBACK4), nft.return_())
            yield from (("prerouting", rule) for rule in self._remember())
            for chain in ("prerouting", "output"):
                yield chain, (_TO_NODE, nft.jump("publish"))
        yield from (("postrouting", rule) for rule in self._postrouting())

    def _remember(self) -> Iterator[tuple[bytes, ...]]:
        from_bridge = nft.equal(nft.IIFNAME, nft.interface(self.bridge))
        for family in self._families():
            remembered = nft.add_to_set(family.daddr, f"node{family.version}")
            yield from_bridge, family.is_(), _TO_NODE, remembered

    def _guard(self) -> Iterator[tuple[bytes, ...]]:
        """Rules that keep pods from services on the node's loopback, which route_localnet opens (CVE-2020-8558)."""
        from_bridge = nft.equal(nft.IIFNAME, nft.interface(self.bridge))
        for match in (_IPV4.to(_LOOPBACK4), _IPV4.from_(_LOOPBACK4)):
            yield from_bridge, _IPV4.is_(), match, nft.drop()

    def _publish(self) -> Iterator[tuple[bytes, ...]]:
        # IPv6 has no route_localnet, so an answer could not get back to ::1.
        yield _IPV6.is_(), _IPV6.to(_LOOPBACK6), nft.return_()
        port = (nft.L4PROTO, nft.TH_DPORT)
        for family in self._families():
            for name, key in (("bound", (family.daddr, *port)), ("any", port)):
                target = nft.dnat_to_map(key, f"{name}{family.version}", family.nfproto)
                yield family.is_(), target

    def _postrouting(self) -> Iterator[tuple[bytes, ...]]:
        to_bridge = nft.equal(nft.OIFNAME, nft.interface(self.bridge))
        not_to_bridge = nft.differs(nft.OIFNAME, nft.interface(self.bridge))
        if self.host_ports:
            # From a process of the node that connected to 127.0.0.1: the pod could not answer to that address.
            yield to_bridge, _IPV4.is_(), _IPV4.from_(_LOOPBACK4), nft.masquerade()
            for subnet in self.subnets:
                # From a pod that connected to an address of the node: the answer of another pod would go to it
                # directly over the bridge, and not be translated back.
                family = _FAMILIES[subnet.version]
                by_node = nft.in_set((family.original_daddr,), f"node{family.version}")
                yield to_bridge, family.is_(), family.from_(subnet), by_node, nft.masquerade()
        if self.masquerade:
            for subnet in self.subnets:
                family = _FAMILIES[subnet.version]
                yield not_to_bridge, family.is_(), family.from_(subnet), nft.masquerade()


def elements(port: HostPort, addresses: Sequence[Address]) -> Iterator[Element]:
    """The elements that forward one port of the node to a pod with these addresses."""
    host = ip_address(port.host_ip) if port.host_ip else None
    protocol = bytes([_PROTOCOLS[port.protocol]])
    host_port, pod_port = (p.to_bytes(2, "big") for p in (port.host_port, port.container_port))
    for address in addresses:
        if host is not None and host.version != address.version:
            continue
        target = nft.concatenation(address.packed, pod_port)
        if host is None or host.is_unspecified:
            yield Element(f"any{address.version}", nft.concatenation(protocol, host_port), target)
        else:
            key = nft.concatenation(host.packed, protocol, host_port)
            yield Element(f"bound{address.version}", key, target)
