import base64
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Close, CloseCode, Frame, Opcode

from nodeagent.serving import http1
from nodeagent.streaming import websocket
from nodeagent.streaming.websocket import Channels, WebSocket
from tests.unit.streaming.recordings import WEBSOCKET_EXEC, WEBSOCKET_HEAD
from tests.unit.streaming.splits import each_byte, feed, pieces


def message(data: bytes, *, text: bool = False, fin: bool = True) -> bytes:
    return Frame(Opcode.TEXT if text else Opcode.BINARY, data, fin).serialize(mask=True)


def more(data: bytes, *, fin: bool) -> bytes:
    return Frame(Opcode.CONT, data, fin).serialize(mask=True)


def parts_of(channels: Channels, *frames: bytes) -> list[tuple[int, bytes]]:
    return [(channel, bytes(data)) for channel, data in channels.receive_data(b"".join(frames))]


def by_channel(parts: list[tuple[int, memoryview]]) -> dict[int, bytes]:
    joined: dict[int, bytes] = {}
    for channel, data in parts:
        joined[channel] = joined.get(channel, b"") + bytes(data)
    return joined


def sent(channels: Channels | WebSocket) -> bytes:
    return b"".join(channels.data_to_send())


# --- handshake ---

# RFC 6455, 4.2.2, for the key in the recording
KEY = b"B3TLitF/japKAlbm5ZdP6w=="
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
ACCEPT = base64.b64encode(hashlib.sha1(KEY + GUID).digest()).decode()


def handshake(head: bytes = WEBSOCKET_HEAD) -> http1.Request:
    request = http1.Exchange().receive_data(head)
    assert request is not None
    return request


def test_a_handshake_of_client_go() -> None:
    status, headers = websocket.accept(handshake(), "v5.channel.k8s.io")
    assert status == 101
    assert dict(headers) | {"Date": ""} == {
        "Date": "",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Accept": ACCEPT,
        "Sec-WebSocket-Protocol": "v5.channel.k8s.io",
    }


def test_a_sub_protocol_may_have_a_slash() -> None:
    head = WEBSOCKET_HEAD.replace(b"v5.channel.k8s.io", b"SPDY/3.1+portforward.k8s.io")
    status, headers = websocket.accept(handshake(head), "SPDY/3.1+portforward.k8s.io")
    assert status == 101
    assert ("Sec-WebSocket-Protocol", "SPDY/3.1+portforward.k8s.io") in headers


@pytest.mark.parametrize("line", [b"Sec-WebSocket-Key: ", b"Sec-WebSocket-Version: "])
def test_a_handshake_is_checked(line: bytes) -> None:
    head = WEBSOCKET_HEAD.replace(line, line + b"x")
    assert websocket.accept(handshake(head), None)[0] == 400


# --- messages ---


def test_pings_are_answered() -> None:
    socket = WebSocket()
    assert socket.receive_data(Frame(Opcode.PING, b"id").serialize(mask=True)) == []
    assert sent(socket) == Frame(Opcode.PONG, b"id").serialize(mask=False)


@pytest.mark.parametrize(
    "frame",
    [
        b"\x82\x01x",  # not masked
        b"\xf2\x80\0\0\0\0",  # reserved bits
        more(b"x", fin=True),  # continues nothing
        b"\x82\xff" + (websocket.MAX_MESSAGE_BYTES + 1).to_bytes(8, "big") + bytes(4),
        Frame(Opcode.CLOSE, Close(CloseCode.NORMAL_CLOSURE, "").serialize()).serialize(mask=True),
    ],
    ids=["unmasked", "reserved", "continuation", "too large", "close"],
)
def test_an_end_is_an_end(frame: bytes) -> None:
    socket = WebSocket()
    assert socket.receive_data(frame + message(b"after")) == []
    assert socket.closed
    assert sent(socket)[0] == 0x88
    socket.send(b"late")
    socket.close()
    assert sent(socket) == b""


@given(st.binary(max_size=200))
def test_no_input_raises(noise: bytes) -> None:
    for base64_form in (False, True):
        Channels(base64=base64_form).receive_data(noise)


# --- channels ---


def test_an_exec_of_client_go() -> None:
    parts = parts_of(Channels(base64=False), WEBSOCKET_EXEC)
    assert parts == [(0, b"hello"), (255, b"\0")]


@given(pieces(WEBSOCKET_EXEC))
def test_borders_of_the_network_mean_nothing(parts: list[bytes]) -> None:
    received = feed(Channels(base64=False).receive_data, parts)
    assert by_channel(received) == {0: b"hello", 255: b"\0"}


@pytest.mark.parametrize("base64_form", [False, True])
def test_each_byte_by_itself(base64_form: bool) -> None:
    body = b"0" + base64.b64encode(b"data") if base64_form else b"\0data"
    stream = message(body[:3], fin=False) + more(body[3:], fin=True)
    received = feed(Channels(base64=base64_form).receive_data, each_byte(stream))
    assert by_channel(received) == {0: b"data"}


def test_a_message_is_handed_on_by_its_fragments() -> None:
    channels = Channels(base64=False)
    assert parts_of(channels, message(b"\x04abc", fin=False)) == [(4, b"abc")]
    assert parts_of(channels, more(b"def", fin=False)) == [(4, b"def")]
    ping = Frame(Opcode.PING, b"").serialize(mask=True)
    assert parts_of(channels, ping, more(b"", fin=True), message(b"\0x")) == [(0, b"x")]


def test_the_channel_may_come_late() -> None:
    frames = [message(b"", fin=False), more(b"\x04", fin=False), more(b"x", fin=True)]
    assert parts_of(Channels(base64=False), *frames) == [(4, b"x")]
    assert parts_of(Channels(base64=False), message(b""), message(b"\0y")) == [(0, b"y")]


def test_what_we_send() -> None:
    plain, encoded = Channels(base64=False), Channels(base64=True)
    plain.send(1, b"out")
    encoded.send(1, b"out")
    assert sent(plain) == b"\x82\x04\x01out"
    assert sent(encoded) == b"\x81\x051b3V0"


@pytest.mark.parametrize("body", [b"", b"x", b"b3V0", b"0b3V"])
def test_what_is_not_base64_closes(body: bytes) -> None:
    channels = Channels(base64=True)
    assert parts_of(channels, message(body)) == []
    assert channels.socket.closed
    assert sent(channels)[2:4] == CloseCode.INVALID_DATA.to_bytes(2, "big")
