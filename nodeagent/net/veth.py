"""A pod's link: a veth pair with one end on the bridge and the other, eth0, in the pod's network namespace.

Its rtnetlink(7) messages are packed here, because the start of each pod depends on their speed. The pair is made from
the node's side; the rest uses a NETLINK_ROUTE socket that was opened inside the namespace, which this process never
enters.
"""

from __future__ import annotations

import functools
import os
import socket
import struct
from collections.abc import Sequence

from nodeagent.net.addresses import Address, Interface
from nodeagent.net.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Connection,
    Request,
    attribute,
    nested,
    text,
    u8,
    u16,
    u32,
)

POD_LINK = "eth0"

_RTM_NEWLINK = 16
_RTM_DELLINK = 17
_RTM_GETLINK = 18
_RTM_NEWADDR = 20
_RTM_NEWROUTE = 24

_IFF_UP = 0x1
_LOOPBACK_INDEX = 1  # of every namespace

# of linux/if_link.h
_IFLA_ADDRESS = 1
_IFLA_IFNAME = 3
_IFLA_MTU = 4
_IFLA_MASTER = 10
_IFLA_LINKINFO = 18
_IFLA_AF_SPEC = 26
_IFLA_NET_NS_FD = 28
_IFLA_EXT_MASK = 29
_IFLA_INFO_KIND = 1
_IFLA_INFO_DATA = 2
_IFLA_INFO_SLAVE_KIND = 4
_IFLA_INFO_SLAVE_DATA = 5
_IFLA_BRPORT_MODE = 4
_IFLA_BRPORT_GROUP_FWD_MASK = 31
_IFLA_INET_CONF = 1
_IFLA_INET6_ADDR_GEN_MODE = 8
_IN6_ADDR_GEN_MODE_NONE = 1
_VETH_INFO_PEER = 1
_RTEXT_FILTER_SKIP_STATS = 8

# of linux/ip.h: settings of net/ipv4/conf
_IPV4_DEVCONF_FORWARDING = 1
_IPV4_DEVCONF_RP_FILTER = 8
_IPV4_DEVCONF_ARP_IGNORE = 19
_NO_ARP_ANSWER = 8

# Of the addresses 01:80:c2:00:00:00 to :0f all but that of PAUSE frames, which the kernel takes for itself.
_ALL_LINK_LOCAL_GROUPS = 0xFFFD

# of linux/if_addr.h and linux/rtnetlink.h
_IFA_ADDRESS = 1
_IFA_LOCAL = 2
_IFA_BROADCAST = 4
_IFA_F_NODAD = 0x2
_RT_TABLE_MAIN = 254
_RTPROT_BOOT = 3
_RTN_UNICAST = 1
_RTA_OIF = 4
_RTA_GATEWAY = 5

_IFINFOMSG = struct.Struct("=BxHiII")
_IFADDRMSG = struct.Struct("=BBBBI")
_RTMSG = struct.Struct("=8BI")


# --- the node's side ------------------------------------------------------------------------------------------------


def create(
    node: Connection, name: str, *, bridge: int, mtu: int, mac: bytes, netns_fd: int
) -> None:
    """Make the pair of `name` and, in the other namespace, eth0 with the address `mac`.

    bridge: its index; `name` becomes a port of it, and is set up. Raises `FileExistsError` where either name is taken;
    then the requests behind the first have configured the link that has it.
    """
    peer = (
        _link(),
        text(_IFLA_IFNAME, POD_LINK),
        u32(_IFLA_MTU, mtu),
        attribute(_IFLA_ADDRESS, mac),
        u32(_IFLA_NET_NS_FD, netns_fd),
    )
    pair = (
        text(_IFLA_INFO_KIND, "veth"),
        nested(_IFLA_INFO_DATA, nested(_VETH_INFO_PEER, *peer)),
    )
    named = _link() + text(_IFLA_IFNAME, name)
    node.perform(
        Request(
            f"link {name}: create",
            _RTM_NEWLINK,
            NLM_F_CREATE | NLM_F_EXCL,
            named + u32(_IFLA_MTU, mtu) + u32(_IFLA_MASTER, bridge) + nested(_IFLA_LINKINFO, *pair),
        ),
        *_configure_port(name),
    )


def plug_in(node: Connection, name: str, *, bridge: int) -> None:
    """Make the link `name` a port of the bridge of this index, and set it up."""
    body = _link() + text(_IFLA_IFNAME, name) + u32(_IFLA_MASTER, bridge)
    what = f"link {name}: make it a port of the bridge"
    node.perform(Request(what, _RTM_NEWLINK, 0, body), *_configure_port(name))


def _configure_port(name: str) -> tuple[Request, Request]:
    """The requests that configure a port: the node hears a pod by the bridge only, never by the port itself.

    - hairpin mode: a pod reaches its own published port through the port it came from when bridged packets are
      translated (br_netfilter);
    - frames to link-local groups (IEEE 802.1Q, table 8-1) go through the bridge as all others do. The kernel would hand
      them, whatever is in them, to the node's IP as come by the port, past the bridge's tables and settings;
    - IPv4 neither answers nor believes what comes by the port while the bridge is gone.
    """
    as_port = (
        text(_IFLA_INFO_SLAVE_KIND, "bridge"),
        nested(
            _IFLA_INFO_SLAVE_DATA,
            u8(_IFLA_BRPORT_MODE, 1),
            u16(_IFLA_BRPORT_GROUP_FWD_MASK, _ALL_LINK_LOCAL_GROUPS),
        ),
    )
    deaf = nested(
        _IFLA_INET_CONF,
        u32(_IPV4_DEVCONF_FORWARDING, 0),
        u32(_IPV4_DEVCONF_RP_FILTER, 1),
        u32(_IPV4_DEVCONF_ARP_IGNORE, _NO_ARP_ANSWER),
    )
    named = text(_IFLA_IFNAME, name)
    return (
        Request(
            f"link {name}: configure as a port",
            _RTM_NEWLINK,
            0,
            _link()
            + named
            + nested(_IFLA_LINKINFO, *as_port)
            + nested(_IFLA_AF_SPEC, nested(socket.AF_INET, deaf), *_without_link_local()),
        ),
        Request(f"link {name}: set up", _RTM_NEWLINK, 0, _link(flags=_IFF_UP) + named),
    )


def delete(node: Connection, name: str) -> None:
    """Delete a pair, for which the kernel waits an RCU grace period (16 to 20 ms). Raises `OSError` (ENODEV)."""
    request = Request(f"link {name}: delete", _RTM_DELLINK, 0, _link() + text(_IFLA_IFNAME, name))
    node.perform(request)


# --- the pod's side -------------------------------------------------------------------------------------------------


def configure(pod: Connection, addresses: Sequence[Interface], gateways: Sequence[Address]) -> None:
    """Set lo and eth0 up, and give eth0 its addresses and default routes. Repeating it changes nothing."""
    index = _index(pod)
    pod.perform(
        _set_up("lo", _LOOPBACK_INDEX),
        Request(
            f"link {POD_LINK}: configure",
            _RTM_NEWLINK,
            0,
            _link(index=index) + nested(_IFLA_AF_SPEC, *_without_link_local()),
        ),
        _set_up(POD_LINK, index),
        *(_add_address(index, address) for address in addresses),
        *(_add_default_route(index, gateway) for gateway in gateways),
    )


def _index(pod: Connection) -> int:
    body = _link() + text(_IFLA_IFNAME, POD_LINK) + u32(_IFLA_EXT_MASK, _RTEXT_FILTER_SKIP_STATS)
    answer = pod.ask(Request(f"link {POD_LINK}: look up", _RTM_GETLINK, 0, body))
    index: int = _IFINFOMSG.unpack_from(answer)[2]
    return index


def _set_up(name: str, index: int) -> Request:
    return Request(f"link {name}: set up", _RTM_NEWLINK, 0, _link(index=index, flags=_IFF_UP))


def _add_address(index: int, address: Interface) -> Request:
    family, flags = (socket.AF_INET, 0) if address.version == 4 else (socket.AF_INET6, _IFA_F_NODAD)
    body = _IFADDRMSG.pack(family, address.network.prefixlen, flags, 0, index)
    body += attribute(_IFA_LOCAL, address.packed) + attribute(_IFA_ADDRESS, address.packed)
    if address.version == 4:
        body += attribute(_IFA_BROADCAST, address.network.broadcast_address.packed)
    what = f"link {POD_LINK}: add address {address}"
    return Request(what, _RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, body)


def _add_default_route(index: int, gateway: Address) -> Request:
    family = socket.AF_INET if gateway.version == 4 else socket.AF_INET6
    body = _RTMSG.pack(family, 0, 0, 0, _RT_TABLE_MAIN, _RTPROT_BOOT, 0, _RTN_UNICAST, 0)
    body += attribute(_RTA_GATEWAY, gateway.packed) + u32(_RTA_OIF, index)
    what = f"link {POD_LINK}: add default route by {gateway}"
    return Request(what, _RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, body)


def _link(*, index: int = 0, flags: int = 0) -> bytes:
    """The fixed part of a link's message; `flags` are set, all others stay."""
    return _IFINFOMSG.pack(socket.AF_UNSPEC, 0, index, flags, flags)


@functools.cache
def _without_link_local() -> tuple[bytes, ...]:
    """The attribute, set before the link is up, by which the kernel gives it no IPv6 address of its own.

    So there is no duplicate address detection, during which an address cannot be used (RFC 4862, 5.4).
    """
    if not os.path.exists("/proc/sys/net/ipv6"):
        return ()  # a kernel without IPv6 refuses the attribute
    return (nested(socket.AF_INET6, u8(_IFLA_INET6_ADDR_GEN_MODE, _IN6_ADDR_GEN_MODE_NONE)),)
