"""Host ports of pods that the node's own processes listen on: found for a warning, never for a refusal.

Destination NAT comes before the node's sockets, so a pod takes the port over and the process gets no more connections,
without an error on either side. SCTP is not examined.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import takewhile

from nodeagent.net.addresses import Address
from nodeagent.records import HostPort

_DIRECTORY = "/proc/self/net"
_FILES = {"tcp": ("tcp", "tcp6"), "udp": ("udp", "udp6")}

# include/net/tcp_states.h: TCP_LISTEN, and TCP_CLOSE, which is a UDP socket that is bound and not connected.
_LISTENING = {"tcp": "0A", "udp": "07"}

# It is not translated, see `nodeagent.net.ruleset`: a process there still gets its connections.
_LOOPBACK6 = IPv6Address("::1")


@dataclass(frozen=True, slots=True)
class Listener:
    """A socket of the node. address: "::" may stand for all addresses of IPv4 as well (ipv6(7), IPV6_V6ONLY)."""

    address: Address
    port: int

    def __str__(self) -> str:
        address = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return f"{address}:{self.port}"


def warnings(ports: Sequence[HostPort], versions: Collection[int]) -> Iterator[str]:
    """A line for each port that a process of the node listens on. versions: of IP, of the pod's addresses."""
    for protocol in sorted({port.protocol for port in ports} & _FILES.keys()):
        listeners = read(protocol)
        for port in ports:
            if port.protocol == protocol and (taken := _taken(port, versions, listeners)):
                yield (
                    f'pod "{port.pod_id}": host port {protocol} {port.host_port}: a process of the node listens on '
                    f"{taken}; what comes to it goes to the pod instead"
                )


def _taken(
    port: HostPort, versions: Collection[int], listeners: Iterable[Listener]
) -> Listener | None:
    for listener in listeners:
        if listener.port == port.host_port and _meets(port.host_ip, versions, listener.address):
            return listener
    return None


def _meets(host_ip: str, versions: Collection[int], address: Address) -> bool:
    """Whether the pod gets what comes to this address of a listener, or to some of it."""
    host = ip_address(host_ip) if host_ip else None
    families = versions if host is None else (host.version,)
    if address.is_unspecified:
        return address.version == 6 or 4 in families
    if address.version not in families or address == _LOOPBACK6:
        return False
    return host is None or host.is_unspecified or host == address


def read(protocol: str) -> list[Listener]:
    """The listeners of "tcp" or "udp". There are none of a family that the kernel lacks."""
    listeners: list[Listener] = []
    for name in _FILES[protocol]:
        try:
            with open(f"{_DIRECTORY}/{name}", encoding="ascii") as file:
                listeners += parse(file, protocol)
        except FileNotFoundError:  # a kernel without IPv6
            continue
    return listeners


def parse(lines: Iterable[str], protocol: str) -> Iterator[Listener]:
    """The listeners in a table of sockets, as proc(5) describes /proc/net/tcp and the like.

    A table of TCP has its listeners before all connections (kernel documentation, proc_net_tcp), which are not read.
    """
    rows: Iterator[list[str]] = (line.split() for line in lines)
    next(rows, None)  # the heads of the columns
    state = _LISTENING[protocol]
    if protocol == "tcp":
        rows = takewhile(lambda row: row[3] == state, rows)
    for row in rows:
        if row[3] == state:
            address, _, port = row[1].partition(":")
            yield Listener(_address(address), int(port, 16))


def _address(text: str) -> Address:
    """An address, written as words of 32 bits, each a number in the byte order of the machine."""
    words = (int(text[at : at + 8], 16) for at in range(0, len(text), 8))
    packed = b"".join(word.to_bytes(4, sys.byteorder) for word in words)
    if len(packed) == 4:
        return IPv4Address(packed)
    address = IPv6Address(packed)
    return address.ipv4_mapped or address
