"""The protocols of exec and attach, without IO: one command's streams over SPDY or over WebSocket channels.

Versions differ in how they end and resize: v1 and v2 have no resize stream, v4 replaced plain text on the error stream
by a metav1.Status, v5 added the half-close of a WebSocket channel.
"""

import json
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from nodeagent.streaming import spdy
from nodeagent.streaming.backend import CommandRequest
from nodeagent.streaming.spdy_frames import Reset
from nodeagent.streaming.websocket import Channels

# client-go offers v5 over SPDY as well, and is answered v4 by every server: over SPDY they are the same.
SPDY_PROTOCOLS = ("v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io")
WEBSOCKET_PROTOCOLS = (
    "v5.channel.k8s.io",
    "v4.channel.k8s.io",
    "v4.base64.channel.k8s.io",
    "channel.k8s.io",
    "base64.channel.k8s.io",
)

MAX_RESIZE_BYTES = 1 << 10
MAX_SIDE = (1 << 16) - 1
CLOSE_CHANNEL = 255


class Channel(IntEnum):
    """The streams of a command, with their numbers as WebSocket channels."""

    STDIN = 0
    STDOUT = 1
    STDERR = 2
    ERROR = 3
    RESIZE = 4


# --- events ---


@dataclass(frozen=True, slots=True)
class Input:
    data: memoryview


@dataclass(frozen=True, slots=True)
class InputEnded:
    """The client sends no more input."""


@dataclass(frozen=True, slots=True)
class Resized:
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Closed:
    """The client has left, or violated the protocol."""


Event = Input | InputEnded | Resized | Closed


# --- how a command ended ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The end of a command. exit_code: of a process that ran; None for a failure, with its reason in message."""

    exit_code: int | None = None
    message: str = ""

    def encode(self, version: int) -> bytes:
        """The bytes for the error stream; client-go takes the code to have 8 bits."""
        if version < 4:
            return b"" if self.exit_code == 0 else self._text.encode()
        return json.dumps(self._status).encode()

    @property
    def _text(self) -> str:
        if self.exit_code is None:
            return self.message
        return f"command terminated with exit code {self.exit_code & 0xFF}"

    @property
    def _status(self) -> dict[str, object]:
        if self.exit_code == 0:
            return {"metadata": {}, "status": "Success"}
        failure: dict[str, object] = {"metadata": {}, "status": "Failure", "message": self._text}
        if self.exit_code is None:
            return failure | {"reason": "InternalError", "code": 500}
        cause = {"reason": "ExitCode", "message": str(self.exit_code & 0xFF)}
        return failure | {"reason": "NonZeroExitCode", "details": {"causes": [cause]}}


# --- the two wires ---


class Wire(Protocol):
    """The streams of one command. `ready` tells whether the client has opened all that it asked for."""

    @property
    def ready(self) -> bool: ...

    def receive_data(self, data: bytes) -> list[Event]: ...

    def data_to_send(self) -> list[bytes]: ...

    def keep_alive(self) -> None: ...

    def send(self, channel: Channel, data: bytes) -> None:
        """Send output; nothing where the client does not want it any more."""

    def finish(self, outcome: Outcome) -> None:
        """End all outputs, report the end of the command, then end the rest."""


class SpdyWire:
    """A wire with a SPDY stream for each stream of the command, opened by the client in any order."""

    def __init__(self, request: CommandRequest, protocol: str) -> None:
        self._spdy = spdy.Connection()
        self._version = version(protocol)
        self._wanted = channels(request)
        self._required = self._wanted - ({Channel.RESIZE} if self._version < 3 else set())
        self._streams: dict[Channel, int] = {}
        self._channels: dict[int, Channel] = {}
        self._sizes = SizeParser()

    @property
    def ready(self) -> bool:
        return self._required <= self._streams.keys()

    def receive_data(self, data: bytes) -> list[Event]:
        events: list[Event] = []
        for event in self._spdy.receive_data(data):
            events += self._translate(event)
        return events

    def data_to_send(self) -> list[bytes]:
        return self._spdy.data_to_send()

    def keep_alive(self) -> None:
        self._spdy.keep_alive()

    def send(self, channel: Channel, data: bytes) -> None:
        stream = self._streams.get(channel, 0)
        if self._spdy.sendable(stream):
            self._spdy.send_data(stream, data)

    def finish(self, outcome: Outcome) -> None:
        for channel in (Channel.STDOUT, Channel.STDERR):
            self._end(channel)
        if status := outcome.encode(self._version):
            self.send(Channel.ERROR, status)
        for channel in (Channel.ERROR, Channel.STDIN, Channel.RESIZE):
            self._end(channel)
        self._spdy.go_away()

    def _end(self, channel: Channel) -> None:
        self._spdy.end(self._streams.get(channel, 0))

    def _translate(self, event: spdy.Event) -> list[Event]:
        match event:
            case spdy.StreamOpened(stream, headers):
                self._open(stream, headers.get("streamtype", ""))
            case spdy.DataReceived(stream, data):
                return self._data(self._channels.get(stream), data)
            case spdy.StreamEnded(stream) | spdy.StreamReset(stream):
                return [InputEnded()] if self._channels.get(stream) is Channel.STDIN else []
            case spdy.Failed():
                return [Closed()]
        return []

    def _open(self, stream: int, name: str) -> None:
        channel = Channel.__members__.get(name.upper())
        if channel not in self._wanted or channel in self._streams:
            self._spdy.reset(stream, Reset.PROTOCOL_ERROR)
            return
        self._streams[channel] = stream
        self._channels[stream] = channel
        self._spdy.reply(stream)

    def _data(self, channel: Channel | None, data: memoryview) -> list[Event]:
        match channel:
            case Channel.STDIN:
                return [Input(data)]
            case Channel.RESIZE:
                return list(self._sizes.feed(data))
        return []


class WebSocketWire:
    """A wire with a WebSocket channel for each stream of the command; all exist from the start."""

    ready = True

    def __init__(self, request: CommandRequest, protocol: str) -> None:
        self._channels = Channels(base64="base64" in protocol)
        self._version = version(protocol)
        self._wanted = channels(request)
        self._sizes = SizeParser()
        # Clients wait for a first message, and look for it on the first channel that they read.
        self._channels.send(min(self._wanted - {Channel.STDIN}), b"")

    def receive_data(self, data: bytes) -> list[Event]:
        events: list[Event] = []
        for number, part in self._channels.receive_data(data):
            events += self._translate(number, part)
        if self._channels.socket.closed:
            events.append(Closed())
        return events

    def data_to_send(self) -> list[bytes]:
        return self._channels.data_to_send()

    def keep_alive(self) -> None:
        self._channels.socket.keep_alive()

    def send(self, channel: Channel, data: bytes) -> None:
        if channel in self._wanted:
            self._channels.send(channel, data)

    def finish(self, outcome: Outcome) -> None:
        """Report the end and close the WebSocket, which ends all channels: the server has no half-close."""
        if status := outcome.encode(self._version):
            self.send(Channel.ERROR, status)
        self._channels.socket.close()

    def _translate(self, number: int, data: memoryview) -> list[Event]:
        if number == CLOSE_CHANNEL and self._version >= 5:
            return [InputEnded()] if Channel.STDIN in data else []
        if number not in self._wanted:
            return []
        if number == Channel.STDIN:
            return [Input(data)]
        return list(self._sizes.feed(data)) if number == Channel.RESIZE else []


def version(protocol: str) -> int:
    """The version in a sub-protocol's name; without a number or a name it is the first."""
    return int(protocol[1]) if protocol.startswith("v") else 1


def channels(request: CommandRequest) -> frozenset[Channel]:
    """The streams that a session for this request has."""
    asked = {
        Channel.STDIN: request.stdin,
        Channel.STDOUT: request.stdout,
        Channel.STDERR: request.stderr,
        Channel.ERROR: True,
        Channel.RESIZE: request.tty,
    }
    return frozenset(channel for channel, wanted in asked.items() if wanted)


class SizeParser:
    """A parser of terminal sizes: JSON objects that follow each other without a separator."""

    def __init__(self) -> None:
        self._text = ""

    def feed(self, data: memoryview) -> list[Resized]:
        """Take data in and return the sizes that are complete. What cannot become a size is dropped."""
        *objects, self._text = (self._text + str(data, "ascii", "replace")).split("}")
        self._text = self._text if len(self._text) <= MAX_RESIZE_BYTES else ""
        sizes = (_size(text + "}") for text in objects if len(text) <= MAX_RESIZE_BYTES)
        return [size for size in sizes if size is not None]


def _size(text: str) -> Resized | None:
    """The size in an object with Width and Height, matched as Go does in any case; both have 16 bits and are not 0."""
    try:
        fields = {name.lower(): value for name, value in json.loads(text).items()}
        width, height = int(fields["width"]), int(fields["height"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        return None
    return Resized(width, height)
