"""The traffic of pods, counted at the node's ends of their links."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nodeagent.net.veth import POD_LINK

_DEVICES = "/proc/self/net/dev"


@dataclass(frozen=True, slots=True, kw_only=True)
class InterfaceStats:
    """Counters of a link as the pod sees it: rx is what the pod received."""

    name: str
    rx_bytes: int
    rx_packets: int
    rx_errors: int
    rx_dropped: int
    tx_bytes: int
    tx_packets: int
    tx_errors: int
    tx_dropped: int


def read_all(prefix: str) -> dict[str, InterfaceStats]:
    """The counters of the links whose names begin with `prefix`, by the name of the node's end.

    /proc/net/dev (proc_pid_net(5)) is one file for all links; reading it takes no lock, unlike rtnetlink's dumps.
    """
    with open(_DEVICES) as file:
        return dict(parse(file, prefix))


def parse(lines: Iterator[str], prefix: str) -> Iterator[tuple[str, InterfaceStats]]:
    for line in lines:
        name, colon, counters = line.strip().partition(":")
        if not colon or not name.startswith(prefix):
            continue
        received, sent = (c := [int(counter) for counter in counters.split()])[:4], c[8:12]
        # What the node's end sent is what the pod received.
        yield (
            name,
            InterfaceStats(
                name=POD_LINK,
                rx_bytes=sent[0],
                rx_packets=sent[1],
                rx_errors=sent[2],
                rx_dropped=sent[3],
                tx_bytes=received[0],
                tx_packets=received[1],
                tx_errors=received[2],
                tx_dropped=received[3],
            ),
        )
