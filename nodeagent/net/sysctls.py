"""Settings below /proc/sys that the pods' network needs in the agent's network namespace.

A name is a path below /proc/sys, because a link's name may have dots.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence

ROOT = "/proc/sys"

_IPV4_FORWARDING = "net/ipv4/ip_forward"
_IPV6_FORWARDING = "net/ipv6/conf/all/forwarding"
_NO_LINK_LOCAL = "1"  # IN6_ADDR_GEN_MODE_NONE
_IN_SPITE_OF_FORWARDING = "2"


def of_node(versions: Sequence[int], advertised: Sequence[str]) -> dict[str, str]:
    """The settings of the node as a whole that forward IPv4 and IPv6, as far as `versions` has them.

    advertised: links that have a default route by a router's advertisement, which forwarding would take from them
    (kernel documentation, ip-sysctl, accept_ra).
    """
    wanted = {}
    if 4 in versions:
        wanted[_IPV4_FORWARDING] = "1"
    if 6 in versions:
        # Before forwarding: that deletes the advertised default routes of all links whose accept_ra is not 2
        # (net/ipv6/route.c, rt6_purge_dflt_routers).
        for link in advertised:
            wanted[f"net/ipv6/conf/{link}/accept_ra"] = _IN_SPITE_OF_FORWARDING
        wanted[_IPV6_FORWARDING] = "1"
    return wanted


def of_bridge(bridge: str, versions: Collection[int], *, check_source: bool) -> dict[str, str]:
    """The settings of the bridge, to be made before it is up: no pod on it is a router of the node (CVE-2020-10749).

    versions: of IP that pods have. check_source: drop what comes by the bridge from an address that no route by the
    bridge leads to. Without an automatic IPv6 address there is no duplicate address detection, which pods could make
    fail (accept_dad). ARP stays as the node has it (arp_ignore, arp_announce, proxy_arp): pods may reach, hence ask
    for, any address of the node, and it answers for no other unless its owner wants that.
    """
    return {
        f"net/ipv4/conf/{bridge}/accept_redirects": "0",
        f"net/ipv4/conf/{bridge}/send_redirects": "0",
        f"net/ipv4/conf/{bridge}/accept_source_route": "0",
        # The kernel uses the greater of this and conf/all/rp_filter (ip-sysctl): 0 may still be a check.
        f"net/ipv4/conf/{bridge}/rp_filter": "1" if check_source else "0",
    } | _of_ipv6(
        bridge,
        {
            "addr_gen_mode": _NO_LINK_LOCAL,
            "accept_ra": "0",
            "autoconf": "0",
            "accept_redirects": "0",
            "disable_ipv6": "0" if 6 in versions else "1",
        },
    )


def of_port(link: str) -> dict[str, str]:
    """The settings of the node's end of a pod's link: no IPv6. All others `veth` makes by netlink."""
    return _of_ipv6(link, {"accept_ra": "0", "disable_ipv6": "1"})


def loopback(bridge: str, *, routed: bool) -> dict[str, str]:
    """The setting by which the node reaches ports of pods at 127.0.0.1, on if `routed`.

    Alone it would let pods reach the node's own services there (CVE-2020-8558): it needs the table's guard.
    """
    return {f"net/ipv4/conf/{bridge}/route_localnet": "1" if routed else "0"}


def _of_ipv6(link: str, wanted: Mapping[str, str]) -> dict[str, str]:
    if not os.path.exists(f"{ROOT}/net/ipv6"):  # a kernel without IPv6
        return {}
    return {f"net/ipv6/conf/{link}/{name}": value for name, value in wanted.items()}


def differing(wanted: Mapping[str, str]) -> dict[str, str]:
    """The present values of the settings that are not as wanted."""
    return {name: now for name, value in wanted.items() if (now := read(name)) != value}


def apply(wanted: Mapping[str, str]) -> None:
    for name in differing(wanted):
        write(name, wanted[name])


def restore(previous: Mapping[str, str]) -> None:
    """Set earlier values again, except those of links that are gone."""
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
