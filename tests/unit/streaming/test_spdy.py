import struct
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.streaming import spdy
from nodeagent.streaming.spdy import (
    Connection,
    DataReceived,
    Event,
    Failed,
    GoneAway,
    ProtocolError,
    StreamEnded,
    StreamOpened,
    StreamReplied,
    StreamReset,
)
from nodeagent.streaming.spdy_frames import FLAG_FIN, FLAG_UNIDIRECTIONAL, Goodbye, Reset, Type
from tests.unit.streaming.recordings import SPDY_EXEC, SPDY_FORWARD
from tests.unit.streaming.splits import each_byte, feed, pieces


def sent(connection: Connection) -> bytes:
    return b"".join(connection.data_to_send())


def control(kind: int, payload: bytes, flags: int = 0, version: int = 3) -> bytes:
    return struct.pack("!HHI", 0x8000 | version, kind, flags << 24 | len(payload)) + payload


def data(stream: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return struct.pack("!II", stream, flags << 24 | len(payload)) + payload


def merged(events: list[Event]) -> list[object]:
    """Events without the borders of the data, which are the network's."""
    result: list[object] = []
    for event in events:
        if not isinstance(event, DataReceived):
            result.append(event)
        elif result and isinstance(result[-1], tuple) and result[-1][0] == event.stream:
            result[-1] = (event.stream, result[-1][1] + bytes(event.data))
        else:
            result.append((event.stream, bytes(event.data)))
    return result


@pytest.fixture
def server() -> Connection:
    return Connection()


@pytest.fixture
def opened(server: Connection) -> Connection:
    """A server whose client has opened stream 1."""
    client = Connection(client=True)
    client.open({"streamtype": "data"})
    server.receive_data(sent(client))
    return server


# --- what real clients send ---


def test_an_exec_of_client_go(server: Connection) -> None:
    assert merged(server.receive_data(SPDY_EXEC)) == [
        StreamOpened(1, {"streamtype": "error"}),
        StreamOpened(3, {"streamtype": "stdin"}),
        StreamOpened(5, {"streamtype": "stdout"}),
        StreamOpened(7, {"streamtype": "stderr"}),
        (3, b"hello"),
        StreamEnded(3),
    ]


def test_a_forward_of_client_go(server: Connection) -> None:
    assert merged(server.receive_data(SPDY_FORWARD)) == [
        StreamOpened(1, {"streamtype": "error", "port": "18555", "requestid": "0"}),
        StreamEnded(1),
        StreamOpened(3, {"streamtype": "data", "port": "18555", "requestid": "0"}),
        (3, b"ping"),
    ]


@pytest.mark.parametrize("recording", [SPDY_EXEC, SPDY_FORWARD])
def test_each_byte_by_itself(recording: bytes) -> None:
    whole, split = Connection(), Connection()
    expected = merged(whole.receive_data(recording))
    assert merged(feed(split.receive_data, each_byte(recording))) == expected


@given(parts=pieces(SPDY_EXEC + control(Type.PING, b"\0\0\0\1") + b"\x80\2"))
def test_borders_of_the_network_mean_nothing(parts: list[bytes]) -> None:
    whole, split = Connection(), Connection()
    expected = merged(whole.receive_data(b"".join(parts)))
    assert merged(feed(split.receive_data, parts)) == expected
    assert sent(split) == sent(whole)


@given(st.binary(max_size=200), st.booleans())
def test_no_input_raises(noise: bytes, behind_a_recording: bool) -> None:
    server = Connection()
    server.receive_data(SPDY_EXEC if behind_a_recording else b"")
    events = server.receive_data(noise)
    assert all(not isinstance(event, Failed) for event in events[:-1])


# --- both ends ---


def test_a_stream_from_its_opening_to_its_end(server: Connection) -> None:
    client = Connection(client=True)
    stream = client.open({"streamtype": "stdin"})
    client.send_data(stream, b"question", fin=True)
    assert merged(server.receive_data(sent(client))) == [
        StreamOpened(1, {"streamtype": "stdin"}),
        (1, b"question"),
        StreamEnded(1),
    ]
    server.reply(stream)
    server.send_data(stream, b"answer")
    server.end(stream)
    assert merged(client.receive_data(sent(server))) == [
        StreamReplied(1),
        (1, b"answer"),
        StreamEnded(1),
    ]
    assert not client.sendable(stream)
    assert not server.sendable(stream)


def test_data_is_handed_on_without_waiting_for_its_frame(opened: Connection) -> None:
    frame = data(1, b"x" * 1000, FLAG_FIN)
    assert merged(opened.receive_data(frame[:500])) == [(1, b"x" * 492)]
    assert merged(opened.receive_data(frame[500:])) == [(1, b"x" * 508), StreamEnded(1)]


def test_data_is_not_copied(opened: Connection) -> None:
    frame = data(1, b"payload")
    (event,) = opened.receive_data(frame)
    assert isinstance(event, DataReceived)
    assert event.data.obj is frame


def test_ping_is_echoed_to_who_asks(server: Connection) -> None:
    client = Connection(client=True)
    client.ping(7)
    question = sent(client)
    server.receive_data(question)
    assert sent(server) == question
    client.receive_data(question)
    assert sent(client) == b""


def test_goaway(server: Connection) -> None:
    client = Connection(client=True)
    client.go_away()
    assert server.receive_data(sent(client)) == [GoneAway()]


def test_reset_ends_both_directions(server: Connection) -> None:
    client = Connection(client=True)
    stream = client.open({})
    client.reset(stream, Reset.CANCEL)
    client.reset(stream, Reset.CANCEL)
    assert server.receive_data(sent(client)) == [StreamOpened(1, {}), StreamReset(1, Reset.CANCEL)]
    assert not server.sendable(stream)


def test_what_crosses_a_reset_is_dropped(opened: Connection) -> None:
    opened.reset(1, Reset.CANCEL)
    assert opened.receive_data(data(1, b"late") + data(1, b"", FLAG_FIN)) == []


def test_a_unidirectional_stream_is_not_for_us(server: Connection) -> None:
    client = Connection(client=True)
    client.open({})
    frame = bytearray(sent(client))
    frame[4] = FLAG_UNIDIRECTIONAL
    server.receive_data(bytes(frame))
    assert not server.sendable(1)


@pytest.mark.parametrize(
    "frame",
    [
        control(Type.SETTINGS, struct.pack("!III", 1, 4, 1000)),
        control(Type.WINDOW_UPDATE, struct.pack("!II", 1, 1000)),
        control(Type.RST_STREAM, struct.pack("!II", 5, Reset.CANCEL)),
        control(77, b"x" * 100_000),
    ],
    ids=["settings", "window update", "reset of no stream", "unknown type, of any length"],
)
def test_tolerated(opened: Connection, frame: bytes) -> None:
    assert merged(opened.receive_data(frame + data(1, b"next"))) == [(1, b"next")]


# --- transitions ---


def in_state(state: spdy.State) -> Connection:
    """A server whose stream 1 is in a state."""
    server = Connection()
    client = Connection(client=True)
    client.open({})
    server.receive_data(sent(client))
    if state in (spdy.State.HALF_CLOSED_LOCAL, spdy.State.CLOSED):
        server.end(1)
    if state in (spdy.State.HALF_CLOSED_REMOTE, spdy.State.CLOSED):
        server.receive_data(data(1, b"", FLAG_FIN))
    sent(server)
    return server


SENDABLE = {spdy.State.OPEN, spdy.State.HALF_CLOSED_REMOTE}
RECEIVABLE = {spdy.State.OPEN, spdy.State.HALF_CLOSED_LOCAL}


@pytest.mark.parametrize(("state", "fin"), list(product(spdy.State, [False, True])))
def test_we_send_only_where_the_table_says_so(state: spdy.State, fin: bool) -> None:
    server = in_state(state)
    assert server.sendable(1) is (state in SENDABLE)
    if state in SENDABLE:
        server.send_data(1, b"x", fin=fin)
        assert server.sendable(1) is not fin
    else:
        with pytest.raises(ProtocolError, match=f"stream 1: SEND_DATA while {state.name}"):
            server.send_data(1, b"x", fin=fin)


@pytest.mark.parametrize(("state", "flags"), list(product(spdy.State, [0, FLAG_FIN])))
def test_a_peer_sends_only_where_the_table_says_so(state: spdy.State, flags: int) -> None:
    events = merged(in_state(state).receive_data(data(1, b"x", flags)))
    if state in RECEIVABLE:
        assert events == [(1, b"x"), *([StreamEnded(1)] if flags else [])]
    elif state is spdy.State.CLOSED:
        assert events == []
    else:
        assert events == [StreamReset(1, Reset.STREAM_ALREADY_CLOSED)]


def test_to_end_twice_is_no_error(opened: Connection) -> None:
    opened.end(1)
    once = sent(opened)
    opened.end(1)
    assert (once, sent(opened)) == (data(1, b"", FLAG_FIN), b"")


# --- violations ---


def syn(stream: int) -> bytes:
    client = Connection(client=True)
    client.open({})
    frame = bytearray(sent(client))
    frame[8:12] = struct.pack("!I", stream)
    return bytes(frame)


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(control(Type.PING, b"\0\0\0\1", version=2), id="version"),
        pytest.param(control(Type.PING, b"\0\0\0"), id="short ping"),
        pytest.param(control(Type.PING, b"\0\0\0\1\0"), id="long ping"),
        pytest.param(control(Type.GOAWAY, b"\0\0\0\1"), id="short goaway"),
        pytest.param(control(Type.RST_STREAM, b"\0\0\0\1"), id="short reset"),
        pytest.param(control(Type.SYN_STREAM, b"\0\0\0\1"), id="short syn"),
        pytest.param(control(Type.HEADERS, b"\0"), id="short headers"),
        pytest.param(control(Type.SYN_STREAM, bytes(10) + b"junk"), id="no header block"),
        pytest.param(control(Type.HEADERS, b"\0\0\0\1junk"), id="no header block in headers"),
        pytest.param(struct.pack("!II", 0x80030001, 20_000), id="control frame too long"),
        pytest.param(syn(2), id="even stream"),
        pytest.param(syn(0), id="stream 0"),
        pytest.param(data(1, b"x"), id="data before any stream"),
        pytest.param(data(0, b"x"), id="data for stream 0"),
        pytest.param(data(0), id="no data for stream 0"),
        pytest.param(data(3, b"", FLAG_FIN), id="end of no stream"),
    ],
)
def test_a_violation_ends_the_connection(server: Connection, frame: bytes) -> None:
    events = server.receive_data(frame + bytes(20))
    assert [type(event) for event in events] == [Failed]
    assert sent(server) == control(Type.GOAWAY, struct.pack("!II", 0, Goodbye.PROTOCOL_ERROR))
    assert server.receive_data(SPDY_EXEC) == []


def test_streams_come_in_order(server: Connection) -> None:
    client = Connection(client=True)
    client.open({})
    client.open({})
    first, second = client.data_to_send()
    failed = bytearray(second)
    failed[8:12] = struct.pack("!I", 1)
    events = server.receive_data(first + bytes(failed))
    assert events == [StreamOpened(1, {}), Failed("SYN_STREAM for stream 1, after 1")]


def test_the_number_of_streams_is_bounded(server: Connection) -> None:
    client = Connection(client=True)
    for _ in range(spdy.MAX_STREAMS + 1):
        client.open({})
    events = server.receive_data(sent(client))
    assert len(events) == spdy.MAX_STREAMS
    refused = spdy.MAX_STREAMS * 2 + 1
    assert sent(server) == control(
        Type.RST_STREAM, struct.pack("!II", refused, Reset.REFUSED_STREAM)
    )
    client.reset(1, Reset.CANCEL)
    client.open({})
    assert [type(event) for event in server.receive_data(sent(client))] == [
        StreamReset,
        StreamOpened,
    ]
