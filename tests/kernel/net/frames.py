"""Frames built by hand, as a process with CAP_NET_RAW sends them, and a wire to send and to see them on."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Self

from tests.kernel.net.world import Namespace

_PATIENCE_SECONDS = 2.0

ETH_P_ALL = 0x0003
IPV4, ARP, RARP, IPV6, VLAN, QINQ = 0x0800, 0x0806, 0x8035, 0x86DD, 0x8100, 0x88A8
PPPOE_DISCOVERY, EAPOL, LLDP = 0x8863, 0x888E, 0x88CC
IGMP, UDP, FRAGMENT, ICMPV6 = 2, 17, 44, 58
HOP_BY_HOP, DESTINATION_OPTIONS = 0, 60
REQUEST, REPLY = 1, 2
ECHO, ROUTER_SOLICITATION, ROUTER_ADVERTISEMENT, SOLICITATION, ADVERTISEMENT, REDIRECT = (
    128,
    133,
    134,
    135,
    136,
    137,
)

BROADCAST = b"\xff" * 6
ALL_NODES = "ff02::1"
NO_MAC = bytes(6)
LLC_SNAP = bytes.fromhex("aaaa03000000")
# What is sent to them (IEEE 802.1Q, table 8-1) a bridge hands to its node as come by the port itself.
NEAREST_BRIDGE, LACP = bytes.fromhex("0180c200000e"), bytes.fromhex("0180c2000002")


@dataclass(frozen=True, slots=True, kw_only=True)
class Station:
    """A member of a bridge, by its addresses."""

    mac: bytes
    ip4: str
    ip6: str = ""
    link_local: str = ""


def packed(address: str) -> bytes:
    return ip_address(address).packed


def multicast_mac(group: str) -> bytes:
    address = packed(group)
    if len(address) == 4:
        return b"\x01\x00\x5e" + bytes([address[1] & 0x7F]) + address[2:]
    return b"\x33\x33" + address[-4:]


def ethernet(destination: bytes, source: bytes, kind: int, payload: bytes) -> bytes:
    return (destination + source + struct.pack(">H", kind) + payload).ljust(60, b"\0")


def arp(operation: int, sender: tuple[bytes, str], target: tuple[bytes, str]) -> bytes:
    head = struct.pack(">HHBBH", 1, IPV4, 6, 4, operation)
    return head + sender[0] + packed(sender[1]) + target[0] + packed(target[1])


def ipv4(source: str, destination: str, payload: bytes, *, protocol: int = UDP) -> bytes:
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), 0, 0, 64, protocol, 0)
    head += packed(source) + packed(destination)
    return head[:10] + checksum(head) + head[12:] + payload


def udp(payload: bytes, port: int = 9) -> bytes:
    """Without a checksum, which IPv4 allows."""
    return struct.pack(">HHHH", port, port, 8 + len(payload), 0) + payload


def ipv6(
    source: str, destination: str, payload: bytes, *, following: int = ICMPV6, hops: int = 255
) -> bytes:
    head = struct.pack(">IHBB", 6 << 28, len(payload), following, hops)
    return head + packed(source) + packed(destination) + payload


def icmpv6(source: str, destination: str, kind: int, body: bytes) -> bytes:
    message = struct.pack(">BBH", kind, 0, 0) + body
    pseudo = packed(source) + packed(destination) + struct.pack(">II", len(message), ICMPV6)
    return message[:2] + checksum(pseudo + message) + message[4:]


def advertised_router(prefix: str, *, lifetime: int = 1800) -> bytes:
    """The body of a router advertisement: a default route, a prefix on the link, addresses by autoconfiguration."""
    flags_and_lifetimes = struct.pack(">BBII", 64, 0xC0, 3600, 3600)
    information = b"\x03\x04" + flags_and_lifetimes + bytes(4) + packed(prefix)
    return struct.pack(">BBHII", 64, 0, lifetime, 0, 0) + information


def advertised_neighbour(target: str, mac: bytes) -> bytes:
    """The body of a neighbour advertisement that overrides what is known."""
    return struct.pack(">I", 0x60000000) + packed(target) + b"\x02\x01" + mac


def solicited_neighbour(target: str, mac: bytes) -> bytes:
    return bytes(4) + packed(target) + b"\x01\x01" + mac


def redirected(target: str, destination: str) -> bytes:
    return bytes(4) + packed(target) + packed(destination)


def nonce(six: bytes) -> bytes:
    """The last option of a message of neighbour discovery, which nobody looks at (RFC 3971)."""
    assert len(six) == 6
    return b"\x0e\x01" + six


def tag(vlan: int, kind: int) -> bytes:
    """What follows the EtherType of a VLAN tag: the tag, and the EtherType of the rest."""
    return struct.pack(">HH", vlan, kind)


def options(following: int) -> bytes:
    """A header of options that says nothing: PadN."""
    return bytes([following, 0, 1, 4]) + bytes(4)


def fragment(following: int, payload: bytes, *, offset: int = 0, more: bool = False) -> bytes:
    return struct.pack(">BBHI", following, 0, offset | more, 0xABAD1DEA) + payload


def igmp_query(*, longest_answer: int) -> bytes:
    """A query for members of groups. longest_answer: in tenths of a second."""
    message = struct.pack(">BBHI", 0x11, longest_answer, 0, 0)
    return message[:2] + checksum(message) + message[4:]


def checksum(data: bytes) -> bytes:
    """The Internet checksum (RFC 1071)."""
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack(">H", ~total & 0xFFFF)


class Wire:
    """A packet socket on a link of a namespace."""

    def __init__(self, namespace: Namespace, link: str = "eth0") -> None:
        self._socket = namespace.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._socket.bind((link, ETH_P_ALL))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, *frames: bytes) -> None:
        for frame in frames:
            self._socket.send(frame)

    async def receive(self, last: bytes, frames: list[bytes]) -> None:
        """Add what comes in to `frames`, until a frame that has `last` in it."""
        async with asyncio.timeout(_PATIENCE_SECONDS):
            while True:
                await _readable(self._socket)
                frame, (_, _, packet_type, *_) = self._socket.recvfrom(1 << 16)
                if packet_type == socket.PACKET_OUTGOING:
                    continue
                if last in frame:
                    return
                frames.append(frame)


async def transmit(send: Callable[[bytes], None], *receivers: Wire) -> list[bytes]:
    """Call `send` with what the last frame has to contain. Returns what the receivers got before that one.

    The kernel keeps the order, but loses frames when it is busy (netdev_max_backlog): then all are sent again.
    """
    frames: list[bytes] = []
    while True:
        last = os.urandom(16)
        send(last)
        try:
            for receiver in receivers:
                await receiver.receive(last, frames)
            return frames
        except TimeoutError:
            continue


async def _readable(one: socket.socket) -> None:
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(one, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(one)
