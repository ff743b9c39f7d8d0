"""A world of network namespaces: a node, pods on it, and a neighbour beyond it.

The test's own thread is on the node while the world is there; a socket made inside another namespace stays there, so
that one event loop can be everybody.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, Self

import pytest
from pyroute2 import AsyncIPRoute

from nodeagent.linux import syscalls
from nodeagent.net import nftables
from nodeagent.net.netlink import NETLINK_ROUTE

PATIENCE_SECONDS = 30.0
REFUSED_SECONDS = 0.3

NODE4, NODE6 = "198.51.100.1", "2001:db8::1"
NEIGHBOUR4, NEIGHBOUR6 = "198.51.100.2", "2001:db8::2"

Where = tuple[str, int]


class Namespace:
    """A network namespace, for as long as its descriptor or a socket of it is open."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    def current(cls) -> Self:
        return cls(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))

    @classmethod
    def new(cls) -> Self:
        before = Namespace.current()
        syscalls.unshare(syscalls.CLONE_NEWNET)
        try:
            return cls.current()
        finally:
            syscalls.setns(before.descriptor, syscalls.CLONE_NEWNET)
            before.close()

    def close(self) -> None:
        os.close(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def entered(self) -> Iterator[None]:
        before = Namespace.current()
        syscalls.setns(self.descriptor, syscalls.CLONE_NEWNET)
        try:
            yield
        finally:
            syscalls.setns(before.descriptor, syscalls.CLONE_NEWNET)
            before.close()

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        with self.entered():
            made = socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol)
        made.setblocking(False)
        return made

    def links(self) -> dict[str, int]:
        with self.entered():
            return {name: index for index, name in socket.if_nameindex()}

    def read(self, name: str) -> str:
        """A setting below /proc/sys."""
        with self.entered(), open(f"/proc/sys/{name}") as file:
            return file.read().strip()

    def write(self, name: str, value: str) -> None:
        with self.entered(), open(f"/proc/sys/{name}", "w") as file:
            file.write(value)

    @asynccontextmanager
    async def routing(self) -> AsyncIterator[Any]:
        """pyroute2 inside."""
        with self.entered():
            ipr = AsyncIPRoute()
            await ipr.setup_endpoint()
        async with ipr:
            yield ipr


async def until(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


def has_nf_tables(nfproto: int = nftables.NFPROTO_INET) -> bool:
    """Whether this kernel has tables of a family."""
    table = nftables.Table("probe", nfproto)
    try:
        with Namespace.new() as namespace, namespace.entered(), nftables.connect() as connection:
            nftables.transact(connection, [table.create(), table.delete()])
    except OSError:
        return False
    return True


HAS_BRIDGE_TABLES = has_nf_tables(nftables.NFPROTO_BRIDGE)

needs_nf_tables = pytest.mark.skipif(not has_nf_tables(), reason="this kernel has no nf_tables")
needs_bridge_tables = pytest.mark.skipif(
    not HAS_BRIDGE_TABLES, reason="this kernel has no nf_tables on bridges"
)


@dataclass(slots=True)
class Pod:
    """A namespace and a NETLINK_ROUTE socket of it, as a supervisor hands them over."""

    id: str = field(default_factory=lambda: secrets.token_hex(32))
    namespace: Namespace = field(default_factory=Namespace.new)
    route: socket.socket = field(init=False)

    def __post_init__(self) -> None:
        self.route = self.namespace.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE)

    def close(self) -> None:
        self.route.close()
        self.namespace.close()


@asynccontextmanager
async def node_and_neighbour() -> AsyncIterator[tuple[Namespace, Namespace]]:
    """The caller's thread is on the node inside. Neither has a route to pods but by the node's own bridges."""
    machine, node, neighbour = Namespace.current(), Namespace.new(), Namespace.new()
    syscalls.setns(node.descriptor, syscalls.CLONE_NEWNET)
    try:
        await _connect(node, neighbour)
        yield node, neighbour
    finally:
        syscalls.setns(machine.descriptor, syscalls.CLONE_NEWNET)
        for namespace in (machine, node, neighbour):
            namespace.close()


async def _connect(node: Namespace, neighbour: Namespace) -> None:
    async with node.routing() as ipr:
        peer = {"ifname": "wan", "net_ns_fd": neighbour.descriptor}
        await ipr.link("add", ifname="wan", kind="veth", peer=peer)
    for namespace, four, six in ((node, NODE4, NODE6), (neighbour, NEIGHBOUR4, NEIGHBOUR6)):
        index = namespace.links()["wan"]
        async with namespace.routing() as ipr:
            await ipr.link("set", index=1, state="up")
            await ipr.addr("add", index=index, address=four, prefixlen=24)
            await ipr.addr("add", index=index, address=six, prefixlen=64, flags=2)
            await ipr.link("set", index=index, state="up")
    async with node.routing() as ipr:
        await ipr.route("add", dst="default", gateway=NEIGHBOUR4)


# --- traffic --------------------------------------------------------------------------------------------------------


def family_of(address: str) -> int:
    return socket.AF_INET if ip_address(address).version == 4 else socket.AF_INET6


@asynccontextmanager
async def tcp_echo_of_peer(namespace: Namespace, where: Where) -> AsyncIterator[None]:
    """A server that tells each client what address it comes from."""

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(str(writer.get_extra_info("peername")[0]).encode())
        writer.close()

    listener = namespace.socket(family_of(where[0]), socket.SOCK_STREAM)
    listener.bind(where)
    server = await asyncio.start_server(serve, sock=listener)
    try:
        yield
    finally:
        server.close()
        await server.wait_closed()


async def ask_tcp(namespace: Namespace, where: Where, patience: float = PATIENCE_SECONDS) -> str:
    client = namespace.socket(family_of(where[0]), socket.SOCK_STREAM)
    try:
        async with asyncio.timeout(patience):
            await asyncio.get_running_loop().sock_connect(client, where)
            return (await asyncio.get_running_loop().sock_recv(client, 100)).decode()
    finally:
        client.close()


@asynccontextmanager
async def udp_echo_of_peer(namespace: Namespace, where: Where) -> AsyncIterator[None]:
    """Answers each datagram with the sender's address."""
    listener = namespace.socket(family_of(where[0]), socket.SOCK_DGRAM)
    listener.bind(where)
    echo = asyncio.create_task(_echo(listener))
    try:
        yield
    finally:
        echo.cancel()
        await asyncio.gather(echo, return_exceptions=True)
        listener.close()


async def _echo(listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    while True:
        _, peer = await loop.sock_recvfrom(listener, 100)
        await loop.sock_sendto(listener, str(peer[0]).encode(), peer)


async def ask_udp(namespace: Namespace, where: Where, patience: float = PATIENCE_SECONDS) -> str:
    """The connected socket accepts an answer from the very address that was asked only."""
    client = namespace.socket(family_of(where[0]), socket.SOCK_DGRAM)
    try:
        return await ask_again(client, where, patience)
    finally:
        client.close()


async def ask_again(client: socket.socket, where: Where, patience: float) -> str:
    client.connect(where)
    client.send(b"?")
    async with asyncio.timeout(patience):
        return (await asyncio.get_running_loop().sock_recv(client, 100)).decode()
