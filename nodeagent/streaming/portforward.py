"""The protocol of port-forward, without IO: TCP connections over pairs of SPDY streams or of WebSocket channels.

Each connection has a stream for its data and one for the reason why it could not be made. client-go ends all
connections of the session when anything is written to the latter, so only a failed dial is.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from nodeagent.errors import InvalidArgument
from nodeagent.streaming import spdy
from nodeagent.streaming.backend import MAX_PORT
from nodeagent.streaming.spdy_frames import Reset
from nodeagent.streaming.websocket import MAX_CHANNELS, MAX_CHANNELS_BASE64, Channels, WebSocket

SPDY_PROTOCOLS = ("portforward.k8s.io",)
TUNNEL_PROTOCOLS = ("SPDY/3.1+portforward.k8s.io",)
WEBSOCKET_PROTOCOLS = (
    "v4.channel.k8s.io",
    "v4.base64.channel.k8s.io",
    "channel.k8s.io",
    "base64.channel.k8s.io",
)

MAX_PENDING = 1024
MAX_REQUEST_ID = 128


# --- events; connection is a number that the wire has chosen ---


@dataclass(frozen=True, slots=True)
class Connect:
    connection: int
    port: int


@dataclass(frozen=True, slots=True)
class Input:
    connection: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class InputEnded:
    """The client sends no more on this connection, but still receives."""

    connection: int


@dataclass(frozen=True, slots=True)
class Aborted:
    """The client has ended this connection in both directions."""

    connection: int


@dataclass(frozen=True, slots=True)
class Closed:
    """The client has left, or violated the protocol."""


Event = Connect | Input | InputEnded | Aborted | Closed


class Wire(Protocol):
    """The connections of one session. half_close: whether a connection can end in one direction only."""

    @property
    def half_close(self) -> bool: ...

    @property
    def finished(self) -> bool:
        """Whether no further connection can be made."""

    def receive_data(self, data: bytes) -> list[Event]: ...

    def data_to_send(self) -> list[bytes]: ...

    def keep_alive(self) -> None: ...

    def send(self, connection: int, data: bytes) -> None:
        """Send output; nothing where the client does not want it any more."""

    def end(self, connection: int) -> None:
        """End the output of a connection."""

    def refuse(self, connection: int, reason: str) -> None:
        """Report that the connection could not be made."""

    def close(self, connection: int) -> None:
        """End what is left of a connection. Called once for each, refused or not."""

    def expire(self, before: float) -> None:
        """Reset streams that were opened before this time and are not part of a pair yet."""


class SpdyWire:
    """A wire of paired streams with one request id, error before data. A connection has its data stream's number."""

    half_close = True
    finished = False

    def __init__(self, connection: spdy.Connection, clock: Callable[[], float]) -> None:
        self._spdy = connection
        self._clock = clock
        self._pending: dict[
            str, tuple[float, int]
        ] = {}  # when it came, and error stream, by request id
        self._errors: dict[int, int] = {}  # error stream by data stream

    def receive_data(self, data: bytes) -> list[Event]:
        events: list[Event] = []
        for event in self._spdy.receive_data(data):
            events += self._translate(event)
        return events

    def data_to_send(self) -> list[bytes]:
        return self._spdy.data_to_send()

    def keep_alive(self) -> None:
        self._spdy.keep_alive()

    def send(self, connection: int, data: bytes) -> None:
        if self._spdy.sendable(connection):
            self._spdy.send_data(connection, data)

    def end(self, connection: int) -> None:
        self._spdy.end(connection)

    def refuse(self, connection: int, reason: str) -> None:
        error = self._errors[connection]
        if self._spdy.sendable(error):
            self._spdy.send_data(error, reason.encode(), fin=True)

    def close(self, connection: int) -> None:
        self._spdy.reset(connection, Reset.CANCEL)
        self._spdy.end(self._errors.pop(connection))

    def expire(self, before: float) -> None:
        for key, (since, error) in list(self._pending.items()):
            if since < before:
                del self._pending[key]
                self._spdy.reset(error, Reset.CANCEL)

    def _translate(self, event: spdy.Event) -> list[Event]:
        match event:
            case spdy.StreamOpened(stream, headers):
                return self._open(stream, headers)
            case spdy.DataReceived(stream, data) if stream in self._errors:
                return [Input(stream, data)]
            case spdy.StreamEnded(stream) if stream in self._errors:
                return [InputEnded(stream)]
            case spdy.StreamReset(stream) if stream in self._errors:
                return [Aborted(stream)]
            case spdy.Failed():
                return [Closed()]
        return []

    def _open(self, stream: int, headers: dict[str, str]) -> list[Event]:
        """Pair a stream with its other half. Old clients send no request id, but open the two one after the other."""
        port = _port(headers.get("port", ""))
        request = headers.get("requestid", "")
        match headers.get("streamtype"):
            case "error" if port and self._may_pend(request):
                return self._open_error(stream, request or f"stream {stream}")
            case "data" if port:
                return self._open_data(stream, request or f"stream {stream - 2}", port)
        self._spdy.reset(stream, Reset.PROTOCOL_ERROR)
        return []

    def _may_pend(self, request: str) -> bool:
        return len(self._pending) < MAX_PENDING and len(request) <= MAX_REQUEST_ID

    def _open_error(self, stream: int, key: str) -> list[Event]:
        if key in self._pending:
            self._spdy.reset(stream, Reset.PROTOCOL_ERROR)
            return []
        self._pending[key] = (self._clock(), stream)
        self._spdy.reply(stream)
        return []

    def _open_data(self, stream: int, key: str, port: int) -> list[Event]:
        if key not in self._pending:
            self._spdy.reset(stream, Reset.PROTOCOL_ERROR)
            return []
        _, self._errors[stream] = self._pending.pop(key)
        self._spdy.reply(stream)
        return [Connect(stream, port)]


class Tunnel(spdy.Connection):
    """A SPDY connection inside the binary messages of a WebSocket; where messages end has no meaning."""

    def __init__(self) -> None:
        super().__init__()
        self._socket = WebSocket()

    def receive_data(self, data: bytes | memoryview) -> list[spdy.Event]:
        events: list[spdy.Event] = []
        for piece in self._socket.receive_data(bytes(data)):
            events += super().receive_data(piece.data)
        if self._socket.closed:
            events.append(spdy.Failed("the WebSocket is closed"))
        return events

    def data_to_send(self) -> list[bytes]:
        if spdy_data := b"".join(super().data_to_send()):
            self._socket.send(spdy_data)
        return self._socket.data_to_send()


class WebSocketWire:
    """A wire of two channels for each port, data and error, which begin with the port; all are dialled at once.

    A channel cannot end by itself: a connection is over as soon as one of its directions is, and the session with the
    last of them.
    """

    half_close = False

    def __init__(self, ports: tuple[int, ...], protocol: str) -> None:
        """Make the channels. Raises InvalidArgument without ports, or with too many for two channels each."""
        base64 = "base64" in protocol
        limit = (MAX_CHANNELS_BASE64 if base64 else MAX_CHANNELS) // 2
        if not 1 <= len(ports) <= limit:
            raise InvalidArgument(f"port: channels carry 1 to {limit} ports, not {len(ports)}")
        self._channels = Channels(base64=base64)
        self._unsent: list[Event] = [Connect(index, port) for index, port in enumerate(ports)]
        self._open = set(range(len(ports)))
        for index, port in enumerate(ports):
            for channel in (2 * index, 2 * index + 1):
                self._channels.send(channel, struct.pack("<H", port))

    @property
    def finished(self) -> bool:
        return not self._open

    def receive_data(self, data: bytes) -> list[Event]:
        events, self._unsent = self._unsent, []
        for channel, part in self._channels.receive_data(data):
            connection, is_error = divmod(channel, 2)
            if connection in self._open and not is_error:
                events.append(Input(connection, part))
        if self._channels.socket.closed:
            events.append(Closed())
        return events

    def data_to_send(self) -> list[bytes]:
        return self._channels.data_to_send()

    def keep_alive(self) -> None:
        self._channels.socket.keep_alive()

    def send(self, connection: int, data: bytes) -> None:
        self._channels.send(2 * connection, data)

    def end(self, connection: int) -> None:
        """Do nothing: the protocol has no half-close."""

    def refuse(self, connection: int, reason: str) -> None:
        self._channels.send(2 * connection + 1, reason.encode())

    def close(self, connection: int) -> None:
        self._open.discard(connection)
        if not self._open:
            self._channels.socket.close()

    def expire(self, before: float) -> None:
        """Do nothing: channels need no pairing."""


def _port(text: str) -> int:
    """The port that a header names, or 0."""
    if text.isascii() and text.isdecimal() and len(text) <= 5 and int(text) <= MAX_PORT:
        return int(text)
    return 0
