"""The node's bridge: made, verified and removed over rtnetlink, by pyroute2.

This is the rare work at the agent's start and end. An agent knows its bridge by the MAC address that it was made with.
The kernel's settings from before are noted in the bridge's alias, which lasts exactly as long as the changed settings;
`ip link` shows it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from ipaddress import ip_interface, ip_network
from typing import Any

from nodeagent.errors import AlreadyExists
from nodeagent.net import sysctls
from nodeagent.net.addresses import Interface, Subnet

IPRoute = Any

DEFAULT_MTU = 1500

_SIOCGIFFLAGS = 0x8913
_IFF_UP = 0x1
_IFREQ = struct.Struct("=16sH22x")
_IFA_F_NODAD = 0x2
_RTN_UNICAST = 1
RTPROT_RA = 9
_ALIAS = "nodeagent"


@asynccontextmanager
async def rtnetlink() -> AsyncIterator[IPRoute]:
    # Its import takes 0.15 s, which commands that touch no network need not wait for.
    from pyroute2.iproute.linux import AsyncIPRoute  # noqa: PLC0415

    async with AsyncIPRoute() as ipr:
        yield ipr


# --- the bridge -----------------------------------------------------------------------------------------------------


async def ensure(
    ipr: IPRoute, name: str, *, mac: bytes, mtu: int, settings: Mapping[str, str]
) -> int:
    """Make the bridge `name` with this MAC address, MTU and settings, or correct it; set it up and return its index.

    Raises `AlreadyExists` where another link has the name.
    """
    if await _link(ipr, name) is None:
        # An address that is given at creation stays; without one a bridge takes the lowest of its ports' (net/bridge,
        # br_stp_recalculate_bridge_id), and changes it as pods come and go.
        with _explained(f"bridge {name}: create"):
            await ipr.link("add", ifname=name, kind="bridge", address=mac.hex(":"))
    link = await _link(ipr, name)
    if link is None or not _is_ours(link, mac):
        raise AlreadyExists(
            f'link "{name}": exists and is not the bridge of this agent; rename it or set network.bridge'
        )
    index = int(link["index"])
    # Before the bridge is up: from then on the kernel would listen to router advertisements and redirects of pods.
    sysctls.apply(settings)
    with _explained(f"bridge {name}: set up"):
        # Snooping waits for a querier before it withholds multicast, neighbour discovery included, from ports that have
        # not asked for it. Any pod can be that querier, and leave its neighbours no time to ask.
        await ipr.link("set", index=index, kind="bridge", br_mcast_snooping=0)
        await ipr.link("set", index=index, mtu=mtu, state="up")
    return index


async def index_of(ipr: IPRoute, name: str) -> int:
    """The index of a link, 0 where there is none of this name."""
    link = await _link(ipr, name)
    return 0 if link is None else int(link["index"])


def _is_ours(link: Any, mac: bytes) -> bool:
    kind = link.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND")
    return bool(kind == "bridge" and link.get("address") == mac.hex(":"))


async def delete(ipr: IPRoute, name: str, *, mac: bytes) -> None:
    """Remove the bridge `name` if it has this MAC address. Succeeds where there is none; another's stays."""
    link = await _link(ipr, name)
    if link is not None and _is_ours(link, mac):
        with _explained(f"bridge {name}: delete"):
            await ipr.link("del", index=link["index"])


async def ensure_addresses(ipr: IPRoute, index: int, wanted: Sequence[Interface]) -> None:
    """Give a bridge these addresses, and no others."""
    present = {
        ip_interface(f"{message.get('address')}/{message['prefixlen']}")
        async for message in await ipr.get_addr(index=index)
    }
    for address in present.difference(wanted):
        with _explained(f"link {index}: remove address {address}"):
            await ipr.addr("del", **_address(index, address))
    for address in (a for a in wanted if a not in present):
        with _explained(f"link {index}: add address {address}"):
            await ipr.addr("add", **_address(index, address))


def _address(index: int, address: Interface) -> dict[str, Any]:
    message = {"index": index, "address": str(address.ip), "prefixlen": address.network.prefixlen}
    return message | ({"flags": _IFA_F_NODAD} if address.version == 6 else {})


def is_up(name: str) -> bool:
    """Whether a link of this name is set up. Raises OSError where that cannot be found out."""
    return bool((flags(name) or 0) & _IFF_UP)


def flags(name: str) -> int | None:
    """The flags of a link (IFF_…), None where there is no link of this name; raises OSError for any other error.

    Unlike rtnetlink this waits for no lock: SIOCGIFFLAGS is served under RCU (net/core/dev_ioctl.c).
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, _IFREQ.pack(name.encode(), 0))
        except OSError as error:
            if error.errno == errno.ENODEV:
                return None
            raise
    found: int = _IFREQ.unpack(answer)[1]
    return found


async def _link(ipr: IPRoute, name: str) -> Any:
    # The answer is read to its end: one that is left half read makes the socket busy.
    links = [link async for link in await ipr.get_links(ifname=name)]
    return links[0] if links else None


# --- the alias ------------------------------------------------------------------------------------------------------


async def set_alias(ipr: IPRoute, index: int, previous: Mapping[str, str]) -> None:
    """Note on a bridge the settings of the kernel that are to be restored when it goes."""
    words = [_ALIAS, *(f"{setting}={value}" for setting, value in previous.items())]
    with _explained(f"link {index}: set alias"):
        await ipr.link("set", index=index, ifalias=" ".join(words))


async def aliases(ipr: IPRoute) -> dict[str, dict[str, str]]:
    """The settings to be restored, as noted on the bridges of all agents, by the bridges' names."""
    found = {}
    async for link in await ipr.get_links(kind="bridge"):
        mark, *settings = (link.get("ifalias") or "").split(" ")
        if mark == _ALIAS:
            found[str(link.get("ifname"))] = dict(s.split("=", 1) for s in settings if "=" in s)
    return found


# --- the node's routes ----------------------------------------------------------------------------------------------


async def routed_subnets(ipr: IPRoute, *, but: int) -> list[Subnet]:
    """The destinations of the node's IPv4 routes, except the default one and those by the link of index `but`."""
    return [
        ip_network((route.get("dst"), route["dst_len"]))
        async for route in await ipr.get_routes(family=socket.AF_INET, type=_RTN_UNICAST)
        if route["dst_len"] and route.get("oif") != but
    ]


async def default_links(ipr: IPRoute, *, protocol: int | None = None) -> list[str]:
    """The links of default routes; with `protocol` only of those that it installed (RTPROT_…)."""
    indices = [
        route.get("oif")
        for family in (socket.AF_INET, socket.AF_INET6)
        async for route in await ipr.get_default_routes(family=family)
        if protocol in (None, route["proto"])
    ]
    return [socket.if_indextoname(index) for index in dict.fromkeys(indices) if index]


async def default_mtu(ipr: IPRoute) -> int:
    """The MTU of the default route's link, or `DEFAULT_MTU` without one."""
    for name in await default_links(ipr):
        link = await _link(ipr, name)
        return int(link.get("mtu"))
    return DEFAULT_MTU


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn pyroute2's errors into OSError, with the request in the text."""
    from pyroute2.netlink.exceptions import NetlinkError  # noqa: PLC0415

    try:
        yield
    except NetlinkError as error:
        raise OSError(error.code, os.strerror(error.code), what) from None
