"""A supervisor's connection to the launcher, which keeps what its successor will need, should it be killed.

The launcher holds copies of descriptors, nothing else; what they mean is in the pod's directory. A supervisor that
outlives its launcher goes to the next one by itself.
"""

import os
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from nodeagent.sandbox import protocol
from nodeagent.sandbox.paths import LAUNCHER_SOCKET
from nodeagent.sandbox.protocol import Body
from nodeagent.sandbox.runtime.loop import Loop
from nodeagent.sandbox.runtime.peers import Peer

_RETRY_MS = 1000


class Deposit(NamedTuple):
    """What the launcher keeps of one container. oom_kills: the counter's value when the container was made."""

    pid: int
    oom_kills: int
    fds: dict[str, int]


class LauncherLink:
    """A supervisor's connection to its launcher. The descriptors of deposits stay the supervisor's."""

    def __init__(self, loop: Loop, pod_id: str, directory: str, connection: socket.socket) -> None:
        self._loop = loop
        self._pod_id = pod_id
        self._directory = directory
        self._deposits: Callable[[], Mapping[str, Deposit]] = dict
        self._number = 0
        self._closing: dict[int, list[int]] = {}
        self._peer: Peer | None = Peer(loop, connection, self._received, self._lost)

    def serve(self, deposits: Callable[[], Mapping[str, Deposit]]) -> None:
        """Report that the pod has been made. deposits: all there are, for a new launcher."""
        self._deposits = deposits
        self._send({"op": "ready"})

    def keep(self, container: str, deposit: Deposit) -> None:
        names, fds = protocol.named(deposit.fds.items())
        kept = {"container": container, "pid": deposit.pid, "oom_kills": deposit.oom_kills}
        self._send({"op": "keep", **kept, "fds": names}, fds)

    def drop(
        self, container: str, names: Iterable[str] | None = None, ours: Iterable[int] = ()
    ) -> None:
        """Have these descriptors closed, or all of the container, and only then close `ours`, which are given up.

        Closing the last copy of a pipe may have to wait for a container that holds its lock: the launcher, which serves
        all pods, must never be the last.
        """
        self._number += 1
        self._closing[self._number] = list(ours)
        names = None if names is None else list(names)
        body = {"op": "drop", "container": container, "names": names, "number": self._number}
        if self._peer is None:
            self._close_ours(self._number)
        else:
            self._send(body)

    @property
    def is_closing(self) -> bool:
        """Whether the launcher has yet to close what we close after it."""
        return bool(self._closing)

    def _close_ours(self, number: int) -> None:
        protocol.close_all(self._closing.pop(number, ()))

    def done(self) -> None:
        """Report that the pod has ended, so that no successor is started."""
        self._send({"op": "done"})

    def fail(self, error: BaseException) -> None:
        """Report that the pod could not be made."""
        self._send({"op": "failed", **protocol.describe_error(error)})

    def _received(self, _peer: Peer, message: protocol.Message) -> None:
        protocol.close_all(message.fds)
        self._close_ours(message.body.get("dropped", 0))

    def _send(self, body: Body, fds: Iterable[int] = ()) -> None:
        if self._peer is not None:
            self._peer.send(body, list(fds))

    def _lost(self, _peer: Peer) -> None:
        self._peer = None
        for number in tuple(self._closing):
            self._close_ours(number)
        self._loop.call_after(_RETRY_MS, self._reconnect)

    def _reconnect(self) -> None:
        connection = connect_launcher(os.path.dirname(os.path.dirname(self._directory)))
        try:
            if connection is not None:
                self._peer = Peer(self._loop, connection, self._received, self._lost)
        except OSError:
            pass  # no memory or no room in epoll: as if nobody listened
        if self._peer is None:
            self._loop.call_after(_RETRY_MS, self._reconnect)
            return
        attended = {"pod": self._pod_id, "directory": self._directory}
        self._send({"op": "attend", **protocol.spoken(), **attended})
        for container, deposit in self._deposits().items():
            self.keep(container, deposit)


def connect_launcher(state: str) -> socket.socket | None:
    """A connection to the launcher of a state directory, None where none can be had now."""
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError:
        return None
    try:
        with protocol.address(f"{state}/{LAUNCHER_SOCKET}") as address:
            connection.connect(address)
    except OSError:
        connection.close()
        return None
    return connection
