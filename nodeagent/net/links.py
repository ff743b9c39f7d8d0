"""Links of pods: made, found again, deleted by name. Each call may wait for the kernel's routing lock (RTNL)."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable

from nodeagent.net import bridge, ipam, sysctls, veth
from nodeagent.net.addresses import gateway
from nodeagent.net.netlink import NETLINK_ROUTE, Connection
from nodeagent.net.setup import NodeSide
from nodeagent.records import Lease


def connect(
    lease: Lease, side: NodeSide, netns_fd: int, route_socket: socket.socket, *, is_new: bool
) -> None:
    """Make the link of a lease, from the bridge to the namespace of both descriptors, and configure both ends.

    Raises `FileExistsError` where the link exists although `is_new` says that it should not.
    """
    mac = ipam.mac(lease)
    gateways = [gateway(address.network).ip for address in ipam.interfaces(lease)]
    with Connection.open(NETLINK_ROUTE) as node:
        try:
            veth.create(
                node, lease.link, bridge=side.index, mtu=side.mtu, mac=mac, netns_fd=netns_fd
            )
        except FileExistsError:
            if is_new:
                raise
        sysctls.apply(sysctls.of_port(lease.link))
        veth.configure(Connection(route_socket), ipam.with_link_local(lease), gateways)


def plug_in(names: Iterable[str], side: NodeSide) -> None:
    """Make links ports of the bridge, which may be another one than the one they were made for."""
    with Connection.open(NETLINK_ROUTE) as node:
        for name in names:
            veth.plug_in(node, name, bridge=side.index)
            sysctls.apply(sysctls.of_port(name))


def delete(name: str) -> None:
    """Delete a link. Succeeds where there is none."""
    with Connection.open(NETLINK_ROUTE) as node:
        try:
            veth.delete(node, name)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise


def exists(name: str) -> bool:
    """Whether the node has a link of this name. Raises OSError where that cannot be found out.

    Not by if_nametoindex(3), whose error is the same for a name that is free and for a lack of descriptors: the
    addresses of a link that stands would be leased again.
    """
    return bridge.flags(name) is not None


def names(prefix: str) -> set[str]:
    """The names of the node's links that begin with `prefix`."""
    return {name for _, name in socket.if_nameindex() if name.startswith(prefix)}
