"""Removal of tracked UDP flows that would outlive the translation they were made for.

A flow keeps its first packet's translation for as long as packets come, so a peer that never stops sending would go on
talking to a pod that is gone, or to no process although a pod now has the port. TCP peers connect again by themselves.
The messages are those of ctnetlink (linux/netfilter/nfnetlink_conntrack.h).
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Collection, Iterator

from nodeagent.net.addresses import Address
from nodeagent.net.netlink import (
    NETLINK_NETFILTER,
    Connection,
    Request,
    attribute,
    attributes,
    nested,
    u8,
    u32,
)

_CT_GET = 1 << 8 | 1
_CT_DELETE = 1 << 8 | 2

_CTA_TUPLE_ORIG = 1
_CTA_TUPLE_REPLY = 2
_CTA_STATUS = 3
_CTA_ZONE = 18
_CTA_FILTER = 25
_CTA_FILTER_ORIG_FLAGS = 1
_CTA_FILTER_REPLY_FLAGS = 2
_CTA_TUPLE_IP = 1
_CTA_TUPLE_PROTO = 2
_CTA_IP_SRC = {4: 1, 6: 3}
_CTA_PROTO_NUM = 1
_CTA_PROTO_DST_PORT = 3

_BY_IP_SRC = 1 << 0
_BY_PROTO_NUM = 1 << 3
_BY_PROTO_DST_PORT = 1 << 5

_IPS_SEEN_REPLY = 1 << 1
_IPS_DST_NAT = 1 << 5

_NFGENMSG = struct.Struct(">BBH")
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_UDP = nested(_CTA_TUPLE_PROTO, u8(_CTA_PROTO_NUM, socket.IPPROTO_UDP))


def forget_flows_to(pods: Collection[Address]) -> None:
    """Delete the flows whose answers come, or would come, from these addresses of pods."""
    with Connection.open(NETLINK_NETFILTER) as connection:
        for address in pods:
            source = nested(_CTA_TUPLE_IP, attribute(_CTA_IP_SRC[address.version], address.packed))
            flags = u32(_CTA_FILTER_REPLY_FLAGS, _BY_IP_SRC | _BY_PROTO_NUM)
            query = nested(_CTA_TUPLE_REPLY, source, _UDP) + nested(_CTA_FILTER, flags)
            for flow in _flows(connection, address.version, query):
                _delete(connection, address.version, flow)


def forget_unanswered(ports: Collection[int], versions: Collection[int]) -> None:
    """Delete flows to a port of the node that were neither answered nor translated."""
    with Connection.open(NETLINK_NETFILTER) as connection:
        for version in versions:
            for port in ports:
                for flow in _flows(connection, version, _to_port(port)):
                    status = int.from_bytes(flow.get(_CTA_STATUS, bytes(4)), "big")
                    if not status & (_IPS_SEEN_REPLY | _IPS_DST_NAT):
                        _delete(connection, version, flow)


def _to_port(port: int) -> bytes:
    protocol = u8(_CTA_PROTO_NUM, socket.IPPROTO_UDP)
    destination = attribute(_CTA_PROTO_DST_PORT, port.to_bytes(2, "big"))
    flags = u32(_CTA_FILTER_ORIG_FLAGS, _BY_PROTO_NUM | _BY_PROTO_DST_PORT)
    proto = nested(_CTA_TUPLE_PROTO, protocol, destination)
    return nested(_CTA_TUPLE_ORIG, proto) + nested(_CTA_FILTER, flags)


def _flows(connection: Connection, version: int, query: bytes) -> Iterator[dict[int, bytes]]:
    header = _NFGENMSG.pack(_FAMILIES[version], 0, 0)
    request = Request("tracked flows: list", _CT_GET, 0, header + query)
    # The whole dump is read before the caller deletes anything: both use this one socket.
    for body in list(connection.dump(request)):
        yield attributes(body[_NFGENMSG.size :])


def _delete(connection: Connection, version: int, flow: dict[int, bytes]) -> None:
    body = _NFGENMSG.pack(_FAMILIES[version], 0, 0)
    body += nested(_CTA_TUPLE_ORIG, flow[_CTA_TUPLE_ORIG])
    if _CTA_ZONE in flow:
        body += attribute(_CTA_ZONE, flow[_CTA_ZONE])
    try:
        connection.perform(Request("tracked flow: delete", _CT_DELETE, 0, body))
    except FileNotFoundError:
        pass  # it has ended meanwhile
