"""The server's side of the protocol: a listening socket, the peers that connect, their requests.

Only root is served. A peer that does not read its replies is disconnected when they exceed a bound; sending never
blocks.
"""

import os
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nodeagent.errors import InvalidArgument, NodeAgentError, ResourceExhausted
from nodeagent.sandbox import protocol
from nodeagent.sandbox.protocol import Body
from nodeagent.sandbox.runtime.loop import READABLE, WRITABLE, Loop, report

MAX_WAITING_MESSAGES = 4096

_BACKLOG = 64
_PAUSE_MS = 200


class Peer:
    """One connection. Messages that find no room wait, in order; `closed` is called once, when it has ended.

    spoken: the versions of the protocol that the peer has said it speaks.
    """

    def __init__(
        self,
        loop: Loop,
        connection: socket.socket,
        received: Callable[["Peer", protocol.Message], None],
        closed: Callable[["Peer"], None],
    ) -> None:
        self._loop = loop
        self._connection = connection
        self.pid = protocol.peer_of(connection).pid
        self.received = received
        self.closed = closed
        self.spoken = protocol.UNVERSIONED
        self._waiting: deque[tuple[bytes, list[int]]] = deque()
        self._open = True
        connection.setblocking(False)
        loop.watch(connection.fileno(), self._ready)

    def send(self, body: Body, fds: Sequence[int] = ()) -> None:
        """Send a message, or nothing if the connection has ended. The descriptors stay the caller's.

        A message that cannot be sent ends the connection: it may be the only news of an end, and the other side, which
        would wait for it for ever, connects again and asks for the state.
        """
        if not self._open:
            return
        packet = protocol.encode(body)
        if not self._waiting and self._try_send(packet, fds):
            return
        if len(self._waiting) >= MAX_WAITING_MESSAGES:
            self.close()
        elif self._open:
            self._wait_for_room(packet, fds)

    def _wait_for_room(self, packet: bytes, fds: Sequence[int]) -> None:
        copies: list[int] = []
        try:
            for descriptor in fds:
                copies.append(os.dup(descriptor))  # noqa: PERF401 those that were made are to be closed
            self._loop.change(self._connection.fileno(), READABLE | WRITABLE)
        except OSError as error:
            protocol.close_all(copies)
            self._give_up(error)
        else:
            self._waiting.append((packet, copies))

    def _give_up(self, error: OSError) -> None:
        report(f"a connection of process {self.pid} is ended: a message cannot be sent: {error}")
        self.close()

    def _try_send(self, packet: bytes, fds: Sequence[int]) -> bool:
        try:
            protocol.send(self._connection, packet, fds)
        except BlockingIOError:
            return False
        except (BrokenPipeError, ConnectionResetError):
            pass  # what it sent before it closed is still to be received, and then the end
        except OSError as error:  # ENOMEM, ENOBUFS, ETOOMANYREFS, EMFILE
            self._give_up(error)
        return True

    def _ready(self, events: int) -> None:
        if events & WRITABLE:
            self._send_waiting()
        if self._open and events & ~WRITABLE:
            self._receive()

    def _send_waiting(self) -> None:
        while self._waiting:
            packet, fds = self._waiting[0]
            if not self._try_send(packet, fds):
                return
            if self._open:
                protocol.close_all(self._waiting.popleft()[1])
        if self._open:
            self._loop.change(self._connection.fileno(), READABLE)

    def drain(self) -> None:
        """Receive everything that is there already, the end of the connection included."""
        while self._open and self._receive():
            pass

    def _receive(self) -> bool:
        """Deal with one message; False when there is none."""
        try:
            message = protocol.receive(self._connection)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return (
                True  # it closed with messages of ours unread; this error comes before what it sent
            )
        except protocol.WithoutDescriptors as error:
            failure = protocol.describe_error(ResourceExhausted(f"a request: {error}"))
            self.send({"id": error.body.get("id"), **failure})
            return True
        except ValueError as error:
            self.send({"id": None, **protocol.describe_error(InvalidArgument(str(error)))})
            return True
        except OSError:
            message = None
        if message is None:
            self.close()
        else:
            self.received(self, message)
        return True

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        self._loop.forget(self._connection.fileno())
        self._connection.close()
        for _, fds in self._waiting:
            protocol.close_all(fds)
        self._waiting.clear()
        self.closed(self)


class Request:
    """A request of a peer. An operation takes the descriptors it wants to keep; it replies once, now or later."""

    def __init__(self, peer: Peer, message: protocol.Message) -> None:
        self.peer = peer
        self.body = message.body
        number = message.body.get("id")
        self._number = number if isinstance(number, int) else None
        names = message.body.get("fds")
        if not isinstance(names, list) or len(names) != len(message.fds):
            names = [None] * len(message.fds)
        self._fds = list(zip(names, message.fds, strict=True))

    def take(self, name: str) -> int | None:
        """The descriptor of that name, None without one."""
        fds = self.take_all(name)
        protocol.close_all(fds[1:])
        return fds[0] if fds else None

    def take_all(self, name: str) -> list[int]:
        found = [descriptor for key, descriptor in self._fds if key == name]
        self._fds = [pair for pair in self._fds if pair[0] != name]
        return found

    def discard(self) -> None:
        """Close the descriptors that nobody took."""
        protocol.close_all(descriptor for _, descriptor in self._fds)
        self._fds = []

    def reply(self, result: Mapping[str, Any] | None = None, fds: Sequence[int] = ()) -> None:
        self.peer.send({"id": self._number, "result": result or {}}, fds)

    def fail(self, error: BaseException) -> None:
        self.peer.send({"id": self._number, **protocol.describe_error(error)})


Operation = Callable[[Request], None]


def perform(
    who: str, operations: Mapping[str, Operation], peer: Peer, message: protocol.Message
) -> None:
    """Do what a request asks; whatever is wrong with it becomes its reply.

    who: the name of this process, for an agent that speaks no version in common.
    """
    request = Request(peer, message)
    name = request.body.get("op")
    try:
        if name == "hello":
            peer.spoken = protocol.spoken_by(request.body)
            request.reply(protocol.spoken())
            return
        protocol.require_common_version("the agent", peer.spoken, who)
        operation = operations.get(name) if isinstance(name, str) else None
        if operation is None:
            raise InvalidArgument(f"operation {name!r}: unknown")
        operation(request)
    except (NodeAgentError, OSError, TimeoutError) as error:
        request.fail(error)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        request.fail(InvalidArgument(f"operation {name!r}: malformed: {error!r}"))
    finally:
        request.discard()


class Listener:
    """The socket `path`, mode 600, which accepts connections of root."""

    def __init__(self, loop: Loop, path: str, accepted: Callable[[socket.socket], None]) -> None:
        self._loop = loop
        self._path = path
        self._accepted = accepted
        self._failing = False
        self._socket = _listen(path)
        self._watch()

    def _watch(self) -> None:
        if self._socket.fileno() < 0:
            return
        try:
            self._loop.watch(self._socket.fileno(), self._accept)
        except OSError as error:
            self._pause(error)

    def _accept(self, _events: int) -> None:
        try:
            connection, _ = self._socket.accept()
        except BlockingIOError:
            return
        except OSError as error:
            self._pause(error)
            return
        self._failing = False
        if protocol.peer_of(connection).uid == 0:
            self._accepted(connection)
        else:
            connection.close()

    def _pause(self, error: OSError) -> None:
        """Stop accepting for a moment: with descriptors used up, the queue would wake the loop without end."""
        if not self._failing:
            self._failing = True
            report(f"{self._path}: cannot accept connections: {error.strerror}")
        self._loop.forget(self._socket.fileno())
        self._loop.call_after(_PAUSE_MS, self._watch)


def _listen(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    # Before bind(2), which gives the file the mode of the socket: others never find it open.
    os.fchmod(listener.fileno(), 0o600)
    with protocol.address(path) as address:
        listener.bind(address)
    listener.listen(_BACKLOG)
    return listener
