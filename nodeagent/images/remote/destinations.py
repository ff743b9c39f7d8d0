"""Bounds on where a registry may lead the agent: by redirects, to token services, to layers that are kept elsewhere.

A node has services for itself on loopback and link-local addresses, and a cloud has its metadata there. Whoever names
an image chooses a registry, and the registry chooses where it redirects to: one at a public address must not lead
there. A registry may lead to its own scope, so that a mirror on loopback or one in a private network works as ever.

The check is of the address that a socket is about to be connected to, once for each connection: a name that is
resolved again (DNS rebinding), an odd notation (``0x7f.1``) or an IPv4 address inside of an IPv6 one changes nothing.
The scope of a registry is that of the connections on which it has answered, not of its name.
"""

import errno
import os
import socket
from contextvars import ContextVar
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import aiohttp
from aiohttp.connector import Connection
from aiohttp.tracing import Trace

from nodeagent.images.remote.dns import Resolver

Address = IPv4Address | IPv6Address


class Scope(IntEnum):
    """How far inside the operator's networks an address is."""

    PUBLIC = 0
    PRIVATE = 1  # a network of the operator's
    NODE = 2  # this node, its links, and metadata of its cloud


_NODE = tuple(
    map(
        ip_network,
        (
            "0.0.0.0/8",  # Linux connects 0.0.0.0 to loopback
            "127.0.0.0/8",
            "169.254.0.0/16",
            "224.0.0.0/4",
            "255.255.255.255/32",
            "fe80::/10",
            "ff00::/8",
            # Metadata of clouds outside of link-local addresses: Alibaba, Azure, Oracle, AWS, Google, Scaleway.
            "100.100.100.200/32",
            "168.63.129.16/32",
            "192.0.0.192/32",
            "fd00:c1::a9fe:a9fe/128",
            "fd00:ec2::/32",
            "fd20:ce::254/128",
            "fd00:42::42/128",
        ),
    )
)
_PRIVATE = tuple(
    map(
        ip_network,
        (
            "10.0.0.0/8",
            "100.64.0.0/10",
            "172.16.0.0/12",
            "192.0.0.0/24",
            "192.168.0.0/16",
            "198.18.0.0/15",
            "240.0.0.0/4",
            "64:ff9b:1::/48",
            "fc00::/7",
            "fec0::/10",
        ),
    )
)

# Where IPv6 addresses have an IPv4 address in them, and how many bits after it: mapped, compatible (with :: and ::1),
# translated (RFC 2765), NAT64 (RFC 6052, RFC 8215), 6to4.
_WITH_IPV4 = tuple(
    (ip_network(network), shift)
    for network, shift in (
        ("::ffff:0:0/96", 0),
        ("::/96", 0),
        ("::ffff:0:0:0/96", 0),
        ("64:ff9b::/96", 0),
        ("64:ff9b:1::/48", 0),
        ("2002::/16", 80),
    )
)


def scope_of(address: str) -> Scope:
    """The scope of an address, with or without a zone; the innermost one for a text that is no address."""
    found = _literal(address)
    return Scope.NODE if found is None else _scope(found)


def scope_of_name(host: str) -> Scope:
    """The scope that a name tells without being resolved: for requests by a proxy, which resolves it."""
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith((".localhost", "localhost.localdomain")):
        return Scope.NODE
    address = _literal(name)
    return Scope.PUBLIC if address is None else _scope(address)


def _scope(address: Address) -> Scope:
    outer = Scope.PUBLIC
    if any(address in network for network in _NODE):
        outer = Scope.NODE
    elif any(address in network for network in _PRIVATE):
        outer = Scope.PRIVATE
    inner = _embedded(address)
    return outer if inner is None else max(outer, _scope(inner))


def _embedded(address: Address) -> IPv4Address | None:
    if isinstance(address, IPv4Address):
        return None
    for network, shift in _WITH_IPV4:
        if address in network:
            return IPv4Address(int(address) >> shift & 0xFFFFFFFF)
    return address.teredo[1] if address.teredo else None


def _literal(name: str) -> Address | None:
    """The address in any notation that getaddrinfo(3) accepts, such as ``2130706433`` or ``0177.1``."""
    try:
        return ip_address(name)
    except ValueError:
        pass
    try:
        return IPv4Address(socket.inet_aton(name))
    except (OSError, ValueError):
        return None


@dataclass(slots=True)
class Visit:
    """The check of one request. limit: the innermost scope allowed; reached: its peer's; refused: one was beyond it.

    It is found by the task that makes the request: aiohttp does not tell for which request it connects.
    """

    limit: Scope
    reached: Scope | None = None
    refused: bool = False

    def begin(self) -> None:
        """Make this the check of the next request of this task."""
        _visit.set(self)

    def check(self, address: str) -> None:
        scope = scope_of(address)
        if scope > self.limit:
            self.refused = True
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), address)
        self.reached = scope


_visit: ContextVar[Visit] = ContextVar("visit")


class Connector(aiohttp.TCPConnector):
    """A connector that connects a request only within the limit of its `Visit`, and notes the scope there."""

    def __init__(self) -> None:
        super().__init__(limit=0, resolver=Resolver(), socket_factory=_socket)

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 (aiohttp's name)
    ) -> Connection:
        """Connect, and check the peer."""
        # It may be an idle connection of an earlier request, which had another limit.
        connection = await super().connect(req, traces, timeout)
        peer = connection.transport and connection.transport.get_extra_info("peername")
        try:
            if not peer:
                raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
            _visit.get().check(peer[0])
        except OSError:
            connection.release()
            raise
        return connection


def _socket(address_info: aiohttp.AddrInfoType) -> socket.socket:
    """Make the socket for one address of a name; when it is refused, aiohttp tries the others."""
    family, kind, protocol, _, address = address_info
    _visit.get().check(address[0])
    return socket.socket(family, kind, protocol)
