"""Streaming clients that know their protocols, but not when to do what; and what they would have us keep."""

import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from itertools import count, islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode

from nodeagent.streaming import portforward, remotecommand, spdy
from nodeagent.streaming.spdy_frames import Reset, Type, control_frame, data_head
from nodeagent.streaming.spdy_headers import DICTIONARY
from tests.fuzz.streaming import COMMAND, TARGETS, Receive
from tests.fuzz.target import Target

PIECES = 2000
KINDS = ["stdin", "stdout", "error", "resize", "data", "nonsense"]


def spdy_frames() -> st.SearchStrategy[bytes]:
    """Frames as a client of bad intentions would make them."""
    stream = st.sampled_from([0, 1, 2, 3, 5, 7, 1 << 30])
    payload = st.binary(max_size=40)
    control = st.builds(control_frame, st.sampled_from(list(Type)), payload)
    data = st.builds(
        lambda number, body, fin: data_head(number, len(body), fin=fin) + body,
        stream,
        payload,
        st.booleans(),
    )
    return st.lists(control | data | payload, max_size=10).map(b"".join)


@st.composite
def spdy_sessions(draw: st.DrawFn) -> bytes:
    """What a client does that knows SPDY, but not when to do what."""
    client = spdy.Connection(client=True)
    streams = [1]
    for _ in range(draw(st.integers(0, 8))):
        stream = draw(st.sampled_from(streams))
        match draw(st.sampled_from(["open", "send", "end", "reset", "ping", "away"])):
            case "open":
                headers = {
                    "streamtype": draw(st.sampled_from(KINDS)),
                    "port": draw(st.sampled_from(["80", "0", "x"])),
                    "requestid": draw(st.sampled_from(["", "1", "2"])),
                }
                streams.append(client.open(headers))
            case "send" if client.sendable(stream):
                client.send_data(stream, draw(st.binary(max_size=30)))
            case "end":
                client.end(stream)
            case "reset":
                client.reset(stream, Reset.CANCEL)
            case "ping":
                client.ping(1)
            case "away":
                client.go_away()
    return b"".join(client.data_to_send())


def websocket_frames() -> st.SearchStrategy[bytes]:
    frame = st.builds(
        lambda opcode, data, fin: Frame(opcode, data, fin).serialize(mask=True),
        st.sampled_from([Opcode.BINARY, Opcode.TEXT, Opcode.CONT]),
        st.binary(max_size=40) | spdy_sessions(),
        st.booleans(),
    )
    return st.lists(frame | st.binary(max_size=10), max_size=10).map(b"".join)


@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
@given(
    step=st.binary(min_size=1, max_size=1),
    data=st.binary(max_size=200) | spdy_frames() | spdy_sessions() | websocket_frames(),
)
@settings(max_examples=60)
def test_no_input_raises(target: Target, step: bytes, data: bytes) -> None:
    target(step + data)


# --- memory ---


def command_over_spdy() -> Receive:
    return remotecommand.SpdyWire(COMMAND, "v4.channel.k8s.io").receive_data


def command_over_websocket() -> Receive:
    return remotecommand.WebSocketWire(COMMAND, "v5.channel.k8s.io").receive_data


def forward_over_spdy() -> Receive:
    wire = portforward.SpdyWire(spdy.Connection(), lambda: 0.0)

    def receive(data: bytes) -> None:
        wire.receive_data(data)
        wire.data_to_send()

    return receive


def endless_control_frame() -> Iterator[bytes]:
    """A type that nobody knows, as long as a frame can be."""
    yield struct.pack("!II", 0x80030063, 0xFFFFFF)
    while True:
        yield bytes(64 << 10)


def endless_streams() -> Iterator[bytes]:
    """Each opened and reset at once, so that their number never grows."""
    client = spdy.Connection(client=True)
    for number in count():
        request = f"{number:0100}"
        stream = client.open({"streamtype": "error", "port": "1", "requestid": request})
        client.reset(stream, Reset.CANCEL)
        yield b"".join(client.data_to_send())


def endless_request_ids() -> Iterator[bytes]:
    """Names as long as a block of headers can be."""
    client = spdy.Connection(client=True)
    for number in count():
        request = f"{number:010000}"
        client.open({"streamtype": "error", "port": "1", "requestid": request})
        yield b"".join(client.data_to_send())


def endless_sizes() -> Iterator[bytes]:
    """One size of a terminal that is never whole."""
    client = spdy.Connection(client=True)
    stream = client.open({"streamtype": "resize"})
    while True:
        client.send_data(stream, b"[" * (32 << 10))
        yield b"".join(client.data_to_send())


def bombs() -> Iterator[bytes]:
    """A few bytes that want to be a gigabyte of headers."""
    deflate = zlib.compressobj(9, zdict=DICTIONARY)
    bomb = deflate.compress(bytes(12 << 20)) + deflate.flush(zlib.Z_SYNC_FLUSH)
    yield control_frame(Type.SYN_STREAM, struct.pack("!IIBB", 1, 0, 0, 0) + bomb)
    while True:
        yield bytes(64 << 10)


def endless_message() -> Iterator[bytes]:
    """Fragments of a message that is never whole."""
    yield Frame(Opcode.BINARY, b"\x04[", fin=False).serialize(mask=True)
    while True:
        yield Frame(Opcode.CONT, b"[" * (32 << 10), fin=False).serialize(mask=True)


@pytest.mark.parametrize(
    ("receiver", "stream"),
    [
        (command_over_spdy, endless_control_frame),
        (command_over_spdy, endless_sizes),
        (command_over_spdy, bombs),
        (command_over_websocket, endless_message),
        (forward_over_spdy, endless_streams),
        (forward_over_spdy, endless_request_ids),
        (forward_over_spdy, endless_control_frame),
    ],
)
def test_what_a_client_can_make_us_keep(
    receiver: Callable[[], Receive], stream: Callable[[], Iterator[bytes]]
) -> None:
    """Thousands of pieces of a hostile stream leave less behind than a few of them."""
    receive = receiver()
    tracemalloc.start()
    try:
        for piece in islice(stream(), PIECES):
            receive(piece)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 1 << 20
