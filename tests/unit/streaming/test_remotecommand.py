import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Close, CloseCode, Frame, Opcode

from nodeagent.streaming import spdy
from nodeagent.streaming.backend import ExecRequest
from nodeagent.streaming.remotecommand import (
    MAX_RESIZE_BYTES,
    SPDY_PROTOCOLS,
    WEBSOCKET_PROTOCOLS,
    Channel,
    Closed,
    Event,
    Input,
    InputEnded,
    Outcome,
    Resized,
    SizeParser,
    SpdyWire,
    WebSocketWire,
)
from nodeagent.streaming.spdy_frames import Reset
from tests.unit.streaming.recordings import SPDY_EXEC, WEBSOCKET_EXEC
from tests.unit.streaming.splits import feed, pieces

PIPES = ExecRequest(container_id="c", command=("x",), stdin=True, stdout=True, stderr=True)
TERMINAL = ExecRequest(container_id="c", command=("x",), stdin=True, stdout=True, tty=True)


def plain(events: list[Event]) -> list[Event | bytes]:
    """Events, and the bytes of input joined."""
    result: list[Event | bytes] = []
    for event in events:
        if not isinstance(event, Input):
            result.append(event)
        elif result and isinstance(result[-1], bytes):
            result[-1] += bytes(event.data)
        else:
            result.append(bytes(event.data))
    return result


def sent(wire: SpdyWire | WebSocketWire | spdy.Connection) -> bytes:
    return b"".join(wire.data_to_send())


# --- how a command ended ---


def test_success() -> None:
    outcome = Outcome(exit_code=0)
    assert json.loads(outcome.encode(4)) == {"metadata": {}, "status": "Success"}
    assert outcome.encode(3) == b""


def test_an_exit_code() -> None:
    outcome = Outcome(exit_code=137)
    assert json.loads(outcome.encode(5)) == {
        "metadata": {},
        "status": "Failure",
        "reason": "NonZeroExitCode",
        "message": "command terminated with exit code 137",
        "details": {"causes": [{"reason": "ExitCode", "message": "137"}]},
    }
    assert outcome.encode(1) == b"command terminated with exit code 137"


def test_a_code_has_eight_bits() -> None:
    status = json.loads(Outcome(exit_code=-1).encode(4))
    assert status["details"]["causes"][0]["message"] == "255"


def test_a_failure() -> None:
    outcome = Outcome(message='container "c": not running')
    status = json.loads(outcome.encode(4))
    assert (status["status"], status["reason"], status["code"]) == ("Failure", "InternalError", 500)
    assert status["message"] == 'container "c": not running'
    assert outcome.encode(2) == b'container "c": not running'


# --- sizes ---


@given(
    st.lists(st.tuples(st.integers(1, 65535), st.integers(1, 65535)), max_size=5),
    st.data(),
)
def test_sizes_follow_each_other_without_a_separator(
    sizes: list[tuple[int, int]], data: st.DataObject
) -> None:
    stream = b"".join(b'{"Width":%d,"Height":%d}' % size for size in sizes) + b" "
    parts = data.draw(pieces(stream + b" "))
    parser = SizeParser()
    assert feed(lambda part: parser.feed(memoryview(part)), parts) == [Resized(*s) for s in sizes]


@pytest.mark.parametrize(
    "junk",
    [
        b'{"Width":0,"Height":5}',
        b'{"Width":70000,"Height":5}',
        b'{"Width":"x","Height":5}',
        b'{"Width":1}',
        b"[1]}",
        b"}}",
        b"\xff}",
        b"[" * 900 + b"}",
        b'{"a":{"Width":1,"Height":1}}',
        b"x" * 2 * MAX_RESIZE_BYTES,
        b"x" * 2 * MAX_RESIZE_BYTES + b"}",
    ],
)
def test_what_is_no_size_is_dropped(junk: bytes) -> None:
    parser = SizeParser()
    before = parser.feed(memoryview(junk))
    assert before in ([], [Resized(1, 1)])
    assert parser.feed(memoryview(b'}{"width":80,"HEIGHT":24}')) == [Resized(80, 24)]


# --- SPDY ---


class Client:
    """A client-go over SPDY."""

    def __init__(self, wire: SpdyWire) -> None:
        self.spdy = spdy.Connection(client=True)
        self.wire = wire
        self.streams: dict[Channel, int] = {}

    def open(self, *channels: Channel) -> None:
        for channel in channels:
            self.streams[channel] = self.spdy.open({"streamtype": channel.name.lower()})

    def talk(self) -> tuple[list[Event | bytes], list[spdy.Event]]:
        """Both sides receive what the other has to say."""
        theirs = self.wire.receive_data(sent(self.spdy))
        return plain(theirs), self.spdy.receive_data(sent(self.wire))


def test_spdy_is_ready_with_the_last_stream() -> None:
    wire = SpdyWire(TERMINAL, "v4.channel.k8s.io")
    client = Client(wire)
    for channel in (Channel.RESIZE, Channel.ERROR, Channel.STDOUT, Channel.STDIN):
        assert not wire.ready
        client.open(channel)
        _, replies = client.talk()
        assert replies == [spdy.StreamReplied(client.streams[channel])]
    assert wire.ready


@pytest.mark.parametrize("protocol", ["channel.k8s.io", "v2.channel.k8s.io"])
def test_old_clients_have_no_resize_stream(protocol: str) -> None:
    wire = SpdyWire(TERMINAL, protocol)
    client = Client(wire)
    client.open(Channel.ERROR, Channel.STDIN, Channel.STDOUT)
    client.talk()
    assert wire.ready


@pytest.mark.parametrize("name", ["resize", "stdout", "nonsense", ""])
def test_streams_that_were_not_asked_for_are_reset(name: str) -> None:
    wire = SpdyWire(PIPES, "v4.channel.k8s.io")
    client = Client(wire)
    client.open(Channel.STDOUT)
    stream = client.spdy.open({"streamtype": name})
    client.spdy.send_data(stream, b"x")
    events, replies = client.talk()
    assert events == []
    assert replies[1:] == [spdy.StreamReset(stream, Reset.PROTOCOL_ERROR)]


@given(pieces(SPDY_EXEC))
def test_a_spdy_exec_of_client_go(parts: list[bytes]) -> None:
    wire = SpdyWire(PIPES, "v4.channel.k8s.io")
    assert plain(feed(wire.receive_data, parts)) == [b"hello", InputEnded()]
    assert wire.ready


def test_spdy_resizes() -> None:
    wire = SpdyWire(TERMINAL, "v3.channel.k8s.io")
    client = Client(wire)
    client.open(Channel.RESIZE)
    client.spdy.send_data(client.streams[Channel.RESIZE], b'{"Width":80,"Height":24}')
    assert client.talk()[0] == [Resized(80, 24)]


def test_output_ends_before_the_status_comes() -> None:
    wire = SpdyWire(PIPES, "v4.channel.k8s.io")
    client = Client(wire)
    client.open(Channel.ERROR, Channel.STDIN, Channel.STDOUT, Channel.STDERR)
    client.talk()
    wire.send(Channel.STDOUT, b"last")
    wire.finish(Outcome(exit_code=0))
    _, events = client.talk()
    error, stdin, stdout, stderr = client.streams.values()
    kinds = [(type(event).__name__, getattr(event, "stream", 0)) for event in events]
    assert kinds == [
        ("DataReceived", stdout),
        ("StreamEnded", stdout),
        ("StreamEnded", stderr),
        ("DataReceived", error),
        ("StreamEnded", error),
        ("StreamEnded", stdin),
        ("GoneAway", 0),
    ]


def test_output_that_the_client_has_reset_is_dropped() -> None:
    wire = SpdyWire(PIPES, "v4.channel.k8s.io")
    client = Client(wire)
    client.open(Channel.ERROR, Channel.STDIN, Channel.STDOUT, Channel.STDERR)
    client.spdy.reset(client.streams[Channel.STDOUT], Reset.CANCEL)
    client.spdy.reset(client.streams[Channel.STDIN], Reset.CANCEL)
    events, _ = client.talk()
    assert events == [InputEnded()]
    wire.send(Channel.STDOUT, b"x")
    wire.finish(Outcome(exit_code=0))
    assert client.streams[Channel.STDOUT] not in [getattr(e, "stream", 0) for e in client.talk()[1]]


def test_a_broken_spdy_connection_is_closed() -> None:
    assert SpdyWire(PIPES, "v4.channel.k8s.io").receive_data(b"\xff" * 8) == [Closed()]


# --- WebSocket ---


def message(data: bytes) -> bytes:
    return Frame(Opcode.BINARY, data).serialize(mask=True)


def unmasked(data: bytes) -> bytes:
    return Frame(Opcode.BINARY, data).serialize(mask=False)


@pytest.mark.parametrize(
    ("request_", "channel"),
    [
        (PIPES, Channel.STDOUT),
        (ExecRequest(container_id="c", command=("x",), stderr=True), Channel.STDERR),
        (ExecRequest(container_id="c", command=("x",), stdin=True, tty=True), Channel.ERROR),
    ],
)
def test_the_first_message_is_on_the_lowest_output(request_: ExecRequest, channel: Channel) -> None:
    wire = WebSocketWire(request_, "v4.channel.k8s.io")
    assert wire.ready
    assert sent(wire) == unmasked(bytes([channel]))


@given(pieces(WEBSOCKET_EXEC))
def test_a_websocket_exec_of_client_go(parts: list[bytes]) -> None:
    wire = WebSocketWire(PIPES, "v5.channel.k8s.io")
    assert plain(feed(wire.receive_data, parts)) == [b"hello", InputEnded(), Closed()]


@pytest.mark.parametrize("protocol", [p for p in WEBSOCKET_PROTOCOLS if "base64" not in p])
def test_a_half_close_is_of_v5(protocol: str) -> None:
    wire = WebSocketWire(PIPES, protocol)
    events = wire.receive_data(message(b"\xff\x00"))
    assert events == ([InputEnded()] if protocol.startswith("v5") else [])


def test_other_channels_do_not_end_the_input() -> None:
    wire = WebSocketWire(PIPES, "v5.channel.k8s.io")
    frames = message(b"\xff\x04") + message(b"\x01no") + message(b"\x07no") + message(b"\x00yes")
    assert plain(wire.receive_data(frames)) == [b"yes"]


def test_websocket_resizes() -> None:
    wire = WebSocketWire(TERMINAL, "channel.k8s.io")
    assert wire.receive_data(message(b'\x04{"Width":80,"Height":24}')) == [Resized(80, 24)]


def test_a_terminal_has_no_stderr() -> None:
    wire = WebSocketWire(TERMINAL, "v4.channel.k8s.io")
    sent(wire)
    wire.send(Channel.STDERR, b"x")
    assert sent(wire) == b""


@pytest.mark.parametrize(
    ("protocol", "status"),
    [
        ("v5.channel.k8s.io", b'\x03{"metadata": {}, "status": "Success"}'),
        ("v4.channel.k8s.io", b'\x03{"metadata": {}, "status": "Success"}'),
        ("channel.k8s.io", None),
        ("", None),
    ],
)
def test_closing_follows_the_status(protocol: str, status: bytes | None) -> None:
    wire = WebSocketWire(PIPES, protocol)
    sent(wire)
    wire.send(Channel.STDERR, b"last")
    wire.finish(Outcome(exit_code=0))
    close = Frame(Opcode.CLOSE, Close(CloseCode.NORMAL_CLOSURE, "").serialize())
    expected = [b"\x02last", *([status] if status else [])]
    assert sent(wire) == b"".join(map(unmasked, expected)) + close.serialize(mask=False)


def test_a_client_that_closes_has_left() -> None:
    wire = WebSocketWire(PIPES, "v5.channel.k8s.io")
    close = Frame(Opcode.CLOSE, b"").serialize(mask=True)
    assert plain(wire.receive_data(message(b"\0bye") + close)) == [b"bye", Closed()]
    wire.send(Channel.STDOUT, b"late")
    wire.finish(Outcome(exit_code=0))


def test_spdy_has_no_v5() -> None:
    assert not any(protocol.startswith("v5") for protocol in SPDY_PROTOCOLS)
