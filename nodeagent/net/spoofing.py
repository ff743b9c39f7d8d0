"""The agent's table of family bridge: a pod can send only from the addresses that it was given, and not as a router.

::

    table bridge nodeagent_0a1b2c3d
        set ipv4        port . MAC address . IPv4 address    of all pods
        set ipv6        port . MAC address . IPv6 address    of all pods, link-local ones too

        chain prerouting   from a port of this agent → chain from_pod
        chain from_pod     IPv4 and ARP by @ipv4, IPv6 by @ipv6 → chain ipv6; all else is dropped
        chain ipv6         no router advertisement and no redirect; neighbour advertisements for own addresses

The bridge learns no address from a frame that is dropped here. A frame takes a few comparisons and one look-up, however
many pods there are; frames of other bridges take one comparison. What passes here, other tables may still drop.

The rules list what may pass, not what may not: frames with VLAN tags (of VLAN 0, too), LLC/SNAP headers and all other
EtherTypes, in which the rest could hide from rules that look for it (CVE-2021-27853 and the like), are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nodeagent.net import ipam
from nodeagent.net import nftables as nft
from nodeagent.net.netlink import Request
from nodeagent.net.nftables import Chain, Element, Load, Set, Table
from nodeagent.records import Lease

_PRIORITY = -300  # before br_netfilter, which shows bridged packets to the other tables, at 0

_ETHER_TYPES = {"ipv4": b"\x08\x00", "arp": b"\x08\x06", "ipv6": b"\x86\xdd"}
_ETHERNET_AND_IPV4 = bytes.fromhex("000108000604")
_ICMPV6 = b"\x3a"
_FRAGMENT_OFFSET_BITS = 0xFFF8

# ICMPv6 types, of RFC 4861
_ROUTER_ADVERTISEMENT = b"\x86"
_NEIGHBOUR_ADVERTISEMENT = b"\x88"
_REDIRECT = b"\x89"

_IPV4_KEY = (nft.IFNAME, nft.ETHER_ADDR, nft.IPV4_ADDR)
_IPV6_KEY = (nft.IFNAME, nft.ETHER_ADDR, nft.IPV6_ADDR)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpoofFilter:
    """The declaration of the table. link_prefix: begins the names of all ports of pods, and no others."""

    table: Table
    link_prefix: str

    def declare(self, elements: Sequence[Element]) -> list[Request]:
        """The requests that replace the table, whether it exists or not, by a new one with these elements."""
        return self.table.replace(
            self.sets(),
            [
                Chain("prerouting", "filter", "prerouting", _PRIORITY),
                Chain("from_pod"),
                Chain("ipv6"),
            ],
            self._rules(),
            elements,
        )

    def sets(self) -> Sequence[Set]:
        """The sets of what pods may send from."""
        return Set("ipv4", _IPV4_KEY), Set("ipv6", _IPV6_KEY)

    def _rules(self) -> Iterator[tuple[str, tuple[bytes, ...]]]:
        from_pod = nft.equal(nft.IIFNAME, self.link_prefix.encode())
        yield "prerouting", (from_pod, nft.goto("from_pod"))
        yield from (("from_pod", rule) for rule in self._from_pod())
        yield from (("ipv6", rule) for rule in self._ipv6())

    def _from_pod(self) -> Iterator[tuple[bytes, ...]]:
        yield _is("ipv4"), _sent_by(nft.ETHER_SADDR, nft.IP_SADDR), nft.accept()
        yield _is("ipv6"), _sent_by(nft.ETHER_SADDR, nft.IP6_SADDR, "ipv6"), nft.goto("ipv6")
        yield (
            _is("arp"),
            nft.equal(nft.ARP_KINDS, _ETHERNET_AND_IPV4),
            _sent_by(nft.ETHER_SADDR, nft.ARP_SADDR_IP),
            _sent_by(nft.ARP_SADDR_ETHER, nft.ARP_SADDR_IP),
            nft.accept(),
        )
        yield (nft.drop(),)

    def _ipv6(self) -> Iterator[tuple[bytes, ...]]:
        # The kernel looks for the upper-layer protocol behind extension headers; where it finds none, nothing matches.
        is_icmpv6 = nft.equal(nft.L4PROTO, _ICMPV6)
        yield nft.differs(nft.L4PROTO, _ICMPV6), nft.accept()
        # The first fragment has the type, and no host may reassemble neighbour discovery (RFC 6980, section 5).
        yield is_icmpv6, nft.has_bits(nft.FRAGMENT_OFFSET, _FRAGMENT_OFFSET_BITS), nft.accept()
        yield (
            is_icmpv6,
            nft.equal(nft.ICMPV6_TYPE, _NEIGHBOUR_ADVERTISEMENT),
            _sent_by(nft.ETHER_SADDR, nft.ND_TARGET, "ipv6"),
            nft.accept(),
        )
        refused = (_NEIGHBOUR_ADVERTISEMENT, _ROUTER_ADVERTISEMENT, _REDIRECT)
        others = (nft.differs(nft.ICMPV6_TYPE, kind) for kind in refused)
        yield is_icmpv6, *others, nft.accept()
        yield (nft.drop(),)


def _is(name: str) -> bytes:
    """A match of the EtherType in the frame: with a VLAN tag, which the kernel has taken out, it is the tag's."""
    return nft.equal(nft.ETHER_TYPE, _ETHER_TYPES[name])


def _sent_by(mac: Load, address: Load, name: str = "ipv4") -> bytes:
    return nft.in_set((nft.IIFNAME, mac, address), name)


def elements(lease: Lease) -> Iterator[Element]:
    """The elements that let a pod send from its addresses."""
    port_and_mac = nft.concatenation(nft.interface(lease.link), ipam.mac(lease))
    for address in ipam.with_link_local(lease):
        yield Element(f"ipv{address.version}", port_and_mac + address.packed)
