"""The protocol SPDY/3.1 without IO: bytes in, events out, bytes to send.

It has as much of the draft as exec, attach and port-forward use: streams opened by the client, data, half-close, reset,
PING and GOAWAY. There is no flow control, as no peer has it (moby/spdystream), and SETTINGS and WINDOW_UPDATE are
ignored. Nothing but a control frame of bounded size is ever buffered: data is passed on as it comes.

::

    OPEN ──send FIN──► HALF_CLOSED_LOCAL ──receive FIN──► CLOSED
      └──receive FIN──► HALF_CLOSED_REMOTE ──send FIN─────►┘
    any ──send or receive RST_STREAM──► CLOSED
"""

import struct
from collections.abc import Callable, Generator
from dataclasses import dataclass
from enum import IntEnum, auto

from nodeagent.streaming import spdy_frames as frames
from nodeagent.streaming.spdy_frames import ByteReader, Goodbye, Reset, Type
from nodeagent.streaming.spdy_headers import MAX_BLOCK_BYTES, Compressor, Decompressor, HeaderError

MAX_STREAMS = 2048
MAX_CONTROL_BYTES = MAX_BLOCK_BYTES + 64


class State(IntEnum):
    OPEN = auto()
    HALF_CLOSED_LOCAL = auto()
    HALF_CLOSED_REMOTE = auto()
    CLOSED = auto()


class Step(IntEnum):
    SEND_DATA = auto()
    SEND_FIN = auto()
    RECEIVE_DATA = auto()
    RECEIVE_FIN = auto()


# Any other step is an error: one of this end raises, one of the peer's resets the stream.
_TRANSITIONS = {
    (State.OPEN, Step.SEND_DATA): State.OPEN,
    (State.OPEN, Step.SEND_FIN): State.HALF_CLOSED_LOCAL,
    (State.OPEN, Step.RECEIVE_DATA): State.OPEN,
    (State.OPEN, Step.RECEIVE_FIN): State.HALF_CLOSED_REMOTE,
    (State.HALF_CLOSED_LOCAL, Step.RECEIVE_DATA): State.HALF_CLOSED_LOCAL,
    (State.HALF_CLOSED_LOCAL, Step.RECEIVE_FIN): State.CLOSED,
    (State.HALF_CLOSED_REMOTE, Step.SEND_DATA): State.HALF_CLOSED_REMOTE,
    (State.HALF_CLOSED_REMOTE, Step.SEND_FIN): State.CLOSED,
}


class ProtocolError(Exception):
    """This end, or the peer, did what SPDY does not allow."""


@dataclass(frozen=True, slots=True)
class StreamOpened:
    stream: int
    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class StreamReplied:
    stream: int


@dataclass(frozen=True, slots=True)
class DataReceived:
    """A part of a data frame: a view of the bytes that were fed, cut as they came."""

    stream: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class StreamEnded:
    """The peer sends no more on this stream."""

    stream: int


@dataclass(frozen=True, slots=True)
class StreamReset:
    stream: int
    status: int


@dataclass(frozen=True, slots=True)
class GoneAway:
    """The peer accepts no new streams; existing ones go on."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The peer violated the protocol. This is the last event; what it sends from now on is dropped."""

    reason: str


Event = StreamOpened | StreamReplied | DataReceived | StreamEnded | StreamReset | GoneAway | Failed


class Connection:
    """One end of a connection. Only clients open streams."""

    def __init__(self, *, client: bool = False) -> None:
        self._client = client
        self._streams: dict[int, State] = {}
        self._last_stream = -1 if client else 0
        self._compressor = Compressor()
        self._decompressor = Decompressor()
        self._events: list[Event] = []
        self._output: list[bytes] = []
        self._reader = ByteReader()
        self._handlers: dict[int, Callable[[int, bytes], None]] = {
            Type.SYN_STREAM: self._on_syn_stream,
            Type.SYN_REPLY: self._on_syn_reply,
            Type.RST_STREAM: self._on_rst_stream,
            Type.PING: self._on_ping,
            Type.GOAWAY: self._on_goaway,
            Type.HEADERS: self._on_headers,
        }
        self._parser = self._parse()
        next(self._parser)

    # --- the three verbs ---

    def receive_data(self, data: bytes | memoryview) -> list[Event]:
        """Take the peer's bytes and return their events. Answers that SPDY itself needs are in `data_to_send` then."""
        self._reader.feed(data)
        next(self._parser)
        events, self._events = self._events, []
        return events

    def data_to_send(self) -> list[bytes]:
        output, self._output = self._output, []
        return output

    # --- what we do ---

    def sendable(self, stream: int) -> bool:
        """Whether this end may still send on the stream."""
        return (self._state(stream), Step.SEND_DATA) in _TRANSITIONS

    def open(self, headers: dict[str, str]) -> int:
        """Open a stream, as a client."""
        self._last_stream += 2
        stream = self._last_stream
        self._streams[stream] = State.OPEN
        self._control(
            Type.SYN_STREAM,
            frames.SYN_STREAM.pack(stream, 0, 0, 0) + self._compressor.encode(headers),
        )
        return stream

    def reply(self, stream: int) -> None:
        """Accept a stream that the client has opened."""
        self._control(Type.SYN_REPLY, frames.STREAM.pack(stream) + self._compressor.encode({}))

    def send_data(self, stream: int, data: bytes, *, fin: bool = False) -> None:
        """Send less than 16 MiB; fin ends this direction. Raises ProtocolError where it had been ended before."""
        self._take_step(stream, Step.SEND_DATA)
        self._output.append(frames.data_head(stream, len(data), fin=fin))
        if data:
            self._output.append(data)
        if fin:
            self._take_step(stream, Step.SEND_FIN)

    def end(self, stream: int) -> None:
        """End this direction, if it has not ended."""
        if self.sendable(stream):
            self.send_data(stream, b"", fin=True)

    def reset(self, stream: int, status: Reset) -> None:
        """End both directions, if either is open."""
        if self._streams.pop(stream, None) is not None:
            self._control(Type.RST_STREAM, frames.STREAM_STATUS.pack(stream, status))

    def ping(self, identity: int) -> None:
        """Send a PING, which the peer returns; a client's identities are odd."""
        self._control(Type.PING, frames.STREAM.pack(identity))

    def keep_alive(self) -> None:
        """Send something without meaning that needs no answer: SETTINGS without entries."""
        self._control(Type.SETTINGS, frames.COUNT.pack(0))

    def go_away(self, status: Goodbye = Goodbye.OK) -> None:
        self._control(Type.GOAWAY, frames.STREAM_STATUS.pack(max(self._last_stream, 0), status))

    def _control(self, kind: Type, payload: bytes) -> None:
        self._output.append(frames.control_frame(kind, payload))

    # --- what the peer does ---

    def _parse(self) -> Generator[None, None, None]:
        try:
            while True:
                yield from self._frame()
        except (ProtocolError, HeaderError, struct.error) as error:
            self.go_away(Goodbye.PROTOCOL_ERROR)
            self._streams.clear()
            self._events.append(Failed(str(error)))
        while True:
            yield

    def _frame(self) -> Generator[None, None, None]:
        word, rest = frames.HEAD.unpack((yield from self._reader.exactly(frames.HEAD.size)))
        flags, length = rest >> 24, rest & 0xFFFFFF
        if not word & frames.CONTROL:
            yield from self._data_frame(word, flags, length)
        elif word >> 16 & 0x7FFF != frames.VERSION:
            raise ProtocolError(f"SPDY version {word >> 16 & 0x7FFF}, not {frames.VERSION}")
        elif (handler := self._handlers.get(word & 0xFFFF)) is None:
            yield from self._reader.skip(length)
        elif length > MAX_CONTROL_BYTES:
            raise ProtocolError(f"control frame of {length} bytes")
        else:
            handler(flags, (yield from self._reader.exactly(length)))

    def _data_frame(self, stream: int, flags: int, length: int) -> Generator[None, None, None]:
        self._check_opened(stream)
        while length:
            data = yield from self._reader.some(length)
            length -= len(data)
            if self._received(stream, Step.RECEIVE_DATA):
                self._events.append(DataReceived(stream, data))
        if flags & frames.FLAG_FIN and self._received(stream, Step.RECEIVE_FIN):
            self._events.append(StreamEnded(stream))

    def _on_syn_stream(self, flags: int, payload: bytes) -> None:
        word, _, _, _ = frames.SYN_STREAM.unpack_from(payload)
        stream = word & frames.STREAM_ID
        # Decoded even if the stream is refused: all blocks are one zlib stream (draft 3.1, 2.6.10.1).
        headers = self._decompressor.decode(payload[frames.SYN_STREAM.size :])
        if self._client or not stream & 1 or stream <= self._last_stream:
            raise ProtocolError(f"SYN_STREAM for stream {stream}, after {self._last_stream}")
        self._last_stream = stream
        self._streams[stream] = State.OPEN
        if len(self._streams) > MAX_STREAMS:
            self.reset(stream, Reset.REFUSED_STREAM)
            return
        if flags & frames.FLAG_UNIDIRECTIONAL:
            self._take_step(stream, Step.SEND_FIN)
        self._events.append(StreamOpened(stream, headers))
        self._fin(stream, flags)

    def _on_syn_reply(self, flags: int, payload: bytes) -> None:
        stream = self._with_headers(payload)
        if self._client and stream in self._streams:
            self._events.append(StreamReplied(stream))
            self._fin(stream, flags)

    def _on_headers(self, flags: int, payload: bytes) -> None:
        self._fin(self._with_headers(payload), flags)

    def _on_rst_stream(self, _flags: int, payload: bytes) -> None:
        stream, status = frames.STREAM_STATUS.unpack(payload)
        if self._streams.pop(stream & frames.STREAM_ID, None) is not None:
            self._events.append(StreamReset(stream & frames.STREAM_ID, status))

    def _on_ping(self, _flags: int, payload: bytes) -> None:
        (identity,) = frames.STREAM.unpack(payload)
        if identity & 1 != self._client:
            self._control(Type.PING, payload)

    def _on_goaway(self, _flags: int, payload: bytes) -> None:
        frames.STREAM_STATUS.unpack(payload)
        self._events.append(GoneAway())

    def _with_headers(self, payload: bytes) -> int:
        (word,) = frames.STREAM.unpack_from(payload)
        self._decompressor.decode(payload[frames.STREAM.size :])
        return int(word & frames.STREAM_ID)

    def _fin(self, stream: int, flags: int) -> None:
        if flags & frames.FLAG_FIN and self._received(stream, Step.RECEIVE_FIN):
            self._events.append(StreamEnded(stream))

    # --- states ---

    def _state(self, stream: int) -> State:
        return self._streams.get(stream, State.CLOSED)

    def _check_opened(self, stream: int) -> None:
        if not 0 < stream <= self._last_stream:
            raise ProtocolError(f"data for stream {stream}, which was never opened")

    def _received(self, stream: int, step: Step) -> bool:
        """Take the peer's step; False where the stream is gone, or is reset now because the step is an error."""
        if stream not in self._streams:
            return False  # sent before the peer had seen the RST_STREAM
        if (self._streams[stream], step) in _TRANSITIONS:
            self._take_step(stream, step)
            return True
        self.reset(stream, Reset.STREAM_ALREADY_CLOSED)
        self._events.append(StreamReset(stream, Reset.STREAM_ALREADY_CLOSED))
        return False

    def _take_step(self, stream: int, step: Step) -> None:
        state = _TRANSITIONS.get((self._state(stream), step))
        if state is None:
            raise ProtocolError(f"stream {stream}: {step.name} while {self._state(stream).name}")
        if state is State.CLOSED:
            del self._streams[stream]
        else:
            self._streams[stream] = state
