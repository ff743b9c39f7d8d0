"""The server's end of a WebSocket, without IO, on the core of `websockets`: pieces of messages in, messages out.

It carries the channels of Kubernetes: the first byte of a message says which of several streams it belongs to; in the
base64 forms that byte is a digit and the rest is encoded.
"""

import binascii
from dataclasses import dataclass

from websockets.datastructures import Headers
from websockets.exceptions import InvalidHandshake
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import Request as HandshakeRequest
from websockets.protocol import Protocol, Side, State
from websockets.server import ServerProtocol

from nodeagent.serving import http1

MAX_MESSAGE_BYTES = 16 << 20  # clients that know no better send a whole file as one message

MAX_CHANNELS = 256
MAX_CHANNELS_BASE64 = 10

SUBPROTOCOL_HEADER = "Sec-WebSocket-Protocol"
_DATA = (Opcode.BINARY, Opcode.TEXT, Opcode.CONT)


@dataclass(frozen=True, slots=True)
class Piece:
    """One frame of a message; control frames may come between two of them."""

    data: memoryview
    last: bool


def accept(request: http1.Request, subprotocol: str | None) -> tuple[int, list[tuple[str, str]]]:
    """The status and headers that answer a handshake; the status is 101 if it is accepted.

    `websockets` does not see the sub-protocol: it refuses names like those of Kubernetes, which have a slash.
    """
    try:
        headers = Headers(
            (key, value) for key, value in request.headers if key != SUBPROTOCOL_HEADER.lower()
        )
    except InvalidHandshake:  # a header that is longer, or has other characters, than it likes
        return 400, []
    response = ServerProtocol().accept(HandshakeRequest(request.path, headers))
    answer = [(SUBPROTOCOL_HEADER, subprotocol)] if subprotocol else []
    return response.status_code, [*response.headers.raw_items(), *answer]


class WebSocket:
    """A connection after the handshake."""

    def __init__(self) -> None:
        self._protocol = Protocol(Side.SERVER, max_size=MAX_MESSAGE_BYTES)

    @property
    def closed(self) -> bool:
        """Whether either side has closed, or the peer violated the protocol, so that nothing can be sent any more."""
        return self._protocol.state is not State.OPEN

    def receive_data(self, data: bytes) -> list[Piece]:
        """Take the peer's bytes and return the data in them. Pings are answered without being shown."""
        self._protocol.receive_data(data)
        frames = (event for event in self._protocol.events_received() if isinstance(event, Frame))
        return [
            Piece(memoryview(frame.data), last=frame.fin)
            for frame in frames
            if frame.opcode in _DATA
        ]

    def data_to_send(self) -> list[bytes]:
        return [data for data in self._protocol.data_to_send() if data]

    def send(self, data: bytes, *, text: bool = False) -> None:
        """Send a whole message, or nothing once the connection is closed."""
        if not self.closed:
            (self._protocol.send_text if text else self._protocol.send_binary)(data)

    def keep_alive(self) -> None:
        """Send something without meaning that needs no answer: an unsolicited pong (RFC 6455, 5.5.3)."""
        if not self.closed:
            self._protocol.send_pong(b"")

    def close(self, code: CloseCode = CloseCode.NORMAL_CLOSURE) -> None:
        if not self.closed:
            self._protocol.send_close(code)


class Channels:
    """The streams of one WebSocket, told apart by the first byte of each message."""

    def __init__(self, *, base64: bool) -> None:
        self.socket = WebSocket()
        self._base64 = base64
        self._channel: int | None = None
        self._encoded = bytearray()

    def receive_data(self, data: bytes) -> list[tuple[int, memoryview]]:
        """Return channels and data as they come; an encoded message only when it is complete."""
        take = self._take_encoded if self._base64 else self._take
        parts: list[tuple[int, memoryview]] = []
        try:
            for piece in self.socket.receive_data(data):
                parts += take(piece)
        except binascii.Error:
            self.socket.close(CloseCode.INVALID_DATA)
        return parts

    def data_to_send(self) -> list[bytes]:
        return self.socket.data_to_send()

    def send(self, channel: int, data: bytes) -> None:
        if self._base64:
            self.socket.send(
                b"%d%b" % (channel, binascii.b2a_base64(data, newline=False)), text=True
            )
        else:
            self.socket.send(b"%c%b" % (channel, data))

    def _take(self, piece: Piece) -> list[tuple[int, memoryview]]:
        data = piece.data
        if self._channel is None and data:
            self._channel, data = data[0], data[1:]
        channel = self._channel
        if piece.last:
            self._channel = None
        return [(channel, data)] if channel is not None and data else []

    def _take_encoded(self, piece: Piece) -> list[tuple[int, memoryview]]:
        self._encoded += piece.data
        if not piece.last:
            return []
        message, self._encoded = self._encoded, bytearray()
        if not message[:1].isdigit():
            raise binascii.Error("no channel")
        return [(message[0] - ord("0"), memoryview(binascii.a2b_base64(message[1:])))]
