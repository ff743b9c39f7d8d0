"""Settings below /proc/sys that the pods' network needs, of the namespace that the agent is in.

A name is a path below /proc/sys, because a link's name may have dots.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

ROOT = "/proc/sys"

_IPV4_FORWARDING = "net/ipv4/ip_forward"
_IPV6_FORWARDING = "net/ipv6/conf/all/forwarding"
_NO_LINK_LOCAL = "1"  # IN6_ADDR_GEN_MODE_NONE
_IN_SPITE_OF_FORWARDING = "2"


def of_node(versions: Sequence[int], advertised: Sequence[str]) -> dict[str, str]:
    """What the node as a whole must have, to forward IPv4 and IPv6 as `versions` says.

    advertised: links that have a default route by a router's advertisement; forwarding would take it from them
    (kernel documentation, ip-sysctl, accept_ra).
    """
    wanted = {}
    if 4 in versions:
        wanted[_IPV4_FORWARDING] = "1"
    if 6 in versions:
        for link in advertised:
            wanted[f"net/ipv6/conf/{link}/accept_ra"] = _IN_SPITE_OF_FORWARDING
        wanted[_IPV6_FORWARDING] = "1"
    return wanted


def of_bridge(bridge: str, *, loopback: bool) -> dict[str, str]:
    """What the bridge must have; it goes with it. loopback: the node reaches ports of pods by 127.0.0.1.

    That alone would let pods reach the node's own services there (CVE-2020-8558): it needs the table's guard.
    """
    return {f"net/ipv4/conf/{bridge}/route_localnet": "1" if loopback else "0"}


def disable_link_local(link: str) -> None:
    """No IPv6 address by itself, hence no duplicate address detection; before the link is up."""
    name = f"net/ipv6/conf/{link}/addr_gen_mode"
    if os.path.exists(f"{ROOT}/{name}"):  # not in a kernel without IPv6
        write(name, _NO_LINK_LOCAL)


def differing(wanted: Mapping[str, str]) -> dict[str, str]:
    """The values now of those that are not as wanted."""
    return {name: now for name, value in wanted.items() if (now := read(name)) != value}


def apply(wanted: Mapping[str, str]) -> None:
    for name in differing(wanted):
        write(name, wanted[name])


def restore(previous: Mapping[str, str]) -> None:
    """Settings of links that are gone are gone too."""
    for name, value in previous.items():
        try:
            write(name, value)
        except FileNotFoundError:
            pass


def read(name: str) -> str:
    with open(f"{ROOT}/{name}") as file:
        return file.read().strip()


def write(name: str, value: str) -> None:
    with open(f"{ROOT}/{name}", "w") as file:
        file.write(value)
