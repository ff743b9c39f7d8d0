"""WebSocket without IO, the server's end, on the protocol core of `websockets`: pieces of messages in, messages out.

On top of it the channels of Kubernetes: the first byte of a message says which of several streams it belongs to; in
the base64 forms that byte is a digit and the rest is encoded.
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
    """A frame of a message; control frames may come between two of them."""

    data: memoryview
    last: bool


def accept(request: http1.Request, subprotocol: str | None) -> tuple[int, list[tuple[str, str]]]:
    """Status and headers that answer a handshake; the status is 101 if it is accepted.

    The sub-protocol is kept from `websockets`: names as those of Kubernetes, with a slash, are no tokens to it.
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
        """Either side has closed, or the peer broke the protocol; nothing can be sent any more."""
        return self._protocol.state is not State.OPEN

    def receive_data(self, data: bytes) -> list[Piece]:
        """What the peer says. Pings are answered by themselves."""
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
        """Send a whole message; nothing once the connection is closed."""
        if not self.closed:
            (self._protocol.send_text if text else self._protocol.send_binary)(data)

    def keep_alive(self) -> None:
        """Say something that means nothing and wants no answer: a pong to no ping (RFC 6455, 5.5.3)."""
        if not self.closed:
            self._protocol.send_pong(b"")

    def close(self, code: CloseCode = CloseCode.NORMAL_CLOSURE) -> None:
        if not self.closed:
            self._protocol.send_close(code)


class Channels:
    """Streams over one WebSocket, told apart by the first byte of each message."""

    def __init__(self, *, base64: bool) -> None:
        self.socket = WebSocket()
        self._base64 = base64
        self._channel: int | None = None
        self._encoded = bytearray()

    def receive_data(self, data: bytes) -> list[tuple[int, memoryview]]:
        """Channel and data, as it comes; an encoded message only when it is whole."""
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
