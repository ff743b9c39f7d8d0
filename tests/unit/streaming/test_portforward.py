import pytest
from hypothesis import given
from websockets.frames import Frame, Opcode

from nodeagent.errors import InvalidArgument
from nodeagent.streaming import spdy
from nodeagent.streaming.portforward import (
    MAX_PENDING,
    MAX_REQUEST_ID,
    Aborted,
    Closed,
    Connect,
    Event,
    Input,
    InputEnded,
    SpdyWire,
    Tunnel,
    WebSocketWire,
)
from nodeagent.streaming.spdy_frames import Reset
from tests.unit.streaming.recordings import SPDY_FORWARD
from tests.unit.streaming.splits import feed, pieces


def plain(events: list[Event]) -> list[Event | tuple[int, bytes]]:
    """Events, and the bytes of input joined."""
    result: list[Event | tuple[int, bytes]] = []
    for event in events:
        if not isinstance(event, Input):
            result.append(event)
        elif result and isinstance(result[-1], tuple) and result[-1][0] == event.connection:
            result[-1] = (event.connection, result[-1][1] + bytes(event.data))
        else:
            result.append((event.connection, bytes(event.data)))
    return result


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Client:
    """A client-go over SPDY, and the wire that it talks to."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.spdy = spdy.Connection(client=True)
        self.wire = SpdyWire(spdy.Connection(), self.clock)

    def open(self, kind: str, port: str = "80", request: str | None = "1") -> int:
        headers = {"streamtype": kind, "port": port}
        return self.spdy.open(headers | ({} if request is None else {"requestid": request}))

    def connect(self, request: str = "1") -> tuple[int, int]:
        """Error and data stream of a connection that the wire knows."""
        error = self.open("error", request=request)
        self.spdy.end(error)
        data = self.open("data", request=request)
        assert Connect(data, 80) in self.talk()[0]
        return error, data

    def talk(self) -> tuple[list[Event | tuple[int, bytes]], list[object]]:
        """Both sides receive what the other has to say."""
        events = plain(self.wire.receive_data(b"".join(self.spdy.data_to_send())))
        replies = self.spdy.receive_data(b"".join(self.wire.data_to_send()))
        return events, [
            (event.stream, bytes(event.data)) if isinstance(event, spdy.DataReceived) else event
            for event in replies
        ]


@pytest.fixture
def client() -> Client:
    return Client()


def masked(data: bytes) -> bytes:
    return Frame(Opcode.BINARY, data).serialize(mask=True)


def unmasked(data: bytes) -> bytes:
    return Frame(Opcode.BINARY, data).serialize(mask=False)


# --- pairs of streams ---


@given(pieces(SPDY_FORWARD))
def test_a_forward_of_client_go(parts: list[bytes]) -> None:
    wire = SpdyWire(spdy.Connection(), Clock())
    assert plain(feed(wire.receive_data, parts)) == [Connect(3, 18555), (3, b"ping")]


def test_without_request_ids_the_streams_come_in_turn(client: Client) -> None:
    for port in ("81", "82"):
        client.open("error", port, None)
        client.open("data", port, None)
    assert client.talk()[0] == [Connect(3, 81), Connect(7, 82)]


def test_a_connection_from_its_dial_to_its_end(client: Client) -> None:
    error, data = client.connect()
    client.spdy.send_data(data, b"question", fin=True)
    assert client.talk()[0] == [(data, b"question"), InputEnded(data)]
    client.wire.send(data, b"answer")
    client.wire.end(data)
    assert client.talk()[1] == [(data, b"answer"), spdy.StreamEnded(data)]
    client.wire.close(data)
    assert client.talk()[1] == [spdy.StreamEnded(error)]


def test_only_a_refusal_is_told(client: Client) -> None:
    error, data = client.connect()
    client.wire.refuse(data, "port 80: refused")
    client.wire.close(data)
    assert client.talk()[1] == [
        (error, b"port 80: refused"),
        spdy.StreamEnded(error),
        spdy.StreamReset(data, Reset.CANCEL),
    ]


def test_a_close_before_the_end_is_silent(client: Client) -> None:
    error, data = client.connect()
    client.wire.close(data)
    assert client.talk()[1] == [
        spdy.StreamReset(data, Reset.CANCEL),
        spdy.StreamEnded(error),
    ]
    client.spdy.reset(data, Reset.CANCEL)
    assert client.talk()[0] == []


def test_a_client_aborts_one_connection(client: Client) -> None:
    _, first = client.connect("1")
    _, second = client.connect("2")
    client.spdy.reset(first, Reset.CANCEL)
    client.spdy.send_data(second, b"x")
    assert client.talk()[0] == [Aborted(first), (second, b"x")]
    client.wire.send(first, b"dropped")
    client.wire.end(first)
    assert client.talk()[1] == []


@pytest.mark.parametrize(
    ("kind", "port"),
    [
        ("error", "0"),
        ("error", "65536"),
        ("error", ""),
        ("error", "-1"),
        ("error", "٣"),
        ("x", "80"),
    ],
)
def test_malformed_streams_are_reset(client: Client, kind: str, port: str) -> None:
    stream = client.open(kind, port)
    assert client.talk() == ([], [spdy.StreamReset(stream, Reset.PROTOCOL_ERROR)])


def test_data_comes_behind_its_error_stream(client: Client) -> None:
    stream = client.open("data")
    assert client.talk() == ([], [spdy.StreamReset(stream, Reset.PROTOCOL_ERROR)])


def test_a_request_id_is_used_once_at_a_time(client: Client) -> None:
    first, second = client.open("error"), client.open("error")
    assert client.talk()[1] == [
        spdy.StreamReplied(first),
        spdy.StreamReset(second, Reset.PROTOCOL_ERROR),
    ]


def test_an_error_stream_that_stays_alone_is_dropped(client: Client) -> None:
    old = client.open("error", request="old")
    client.talk()
    client.clock.now = 20.0
    client.open("error", request="young")
    client.talk()
    client.wire.expire(before=10.0)
    assert client.talk()[1] == [spdy.StreamReset(old, Reset.CANCEL)]
    late, young = client.open("data", request="old"), client.open("data", request="young")
    assert client.talk() == (
        [Connect(young, 80)],
        [spdy.StreamReset(late, Reset.PROTOCOL_ERROR), spdy.StreamReplied(young)],
    )


def test_what_waits_for_its_partner_is_bounded(client: Client) -> None:
    for number in range(MAX_PENDING):
        client.spdy.reset(client.open("error", request=str(number)), Reset.CANCEL)
        client.talk()
    stream = client.open("error", request="one more")
    assert client.talk()[1] == [spdy.StreamReset(stream, Reset.PROTOCOL_ERROR)]


def test_a_request_id_is_short(client: Client) -> None:
    stream = client.open("error", request="1" * (MAX_REQUEST_ID + 1))
    assert client.talk()[1] == [spdy.StreamReset(stream, Reset.PROTOCOL_ERROR)]


def test_a_broken_connection_is_closed(client: Client) -> None:
    assert client.wire.receive_data(b"\xff" * 8) == [Closed()]


# --- the tunnel ---


@given(pieces(SPDY_FORWARD))
def test_borders_of_messages_mean_nothing(parts: list[bytes]) -> None:
    wire = SpdyWire(Tunnel(), Clock())
    events = feed(wire.receive_data, [masked(part) for part in parts])
    assert plain(events) == [Connect(3, 18555), (3, b"ping")]


def test_the_tunnel_answers_in_messages() -> None:
    tunnel, bare = Tunnel(), spdy.Connection()
    for connection in (tunnel, bare):
        connection.ping(2)
    assert b"".join(tunnel.data_to_send()) == unmasked(b"".join(bare.data_to_send()))
    assert tunnel.data_to_send() == []


def test_the_end_of_the_tunnel_is_the_end() -> None:
    wire = SpdyWire(Tunnel(), Clock())
    close = Frame(Opcode.CLOSE, b"").serialize(mask=True)
    assert wire.receive_data(masked(SPDY_FORWARD) + close)[-1] == Closed()


# --- channels ---


def test_channels_begin_with_their_ports() -> None:
    wire = WebSocketWire((80, 443), "v4.channel.k8s.io")
    greetings = [b"\0\x50\0", b"\1\x50\0", b"\2\xbb\1", b"\3\xbb\1"]
    assert b"".join(wire.data_to_send()) == b"".join(map(unmasked, greetings))
    assert wire.receive_data(b"") == [Connect(0, 80), Connect(1, 443)]
    assert wire.receive_data(b"") == []


def test_data_on_channels() -> None:
    wire = WebSocketWire((80, 443), "v4.channel.k8s.io")
    wire.data_to_send()
    wire.receive_data(b"")
    events = wire.receive_data(masked(b"\2in") + masked(b"\1no") + masked(b"\x09no"))
    assert plain(events) == [(1, b"in")]
    wire.send(1, b"out")
    assert b"".join(wire.data_to_send()) == unmasked(b"\2out")
    wire.refuse(0, "why")
    assert b"".join(wire.data_to_send()) == unmasked(b"\1why")


def test_other_connections_go_on() -> None:
    wire = WebSocketWire((80, 443), "v4.channel.k8s.io")
    wire.receive_data(b"")
    wire.data_to_send()
    wire.close(0)
    assert plain(wire.receive_data(masked(b"\0late") + masked(b"\2x"))) == [(1, b"x")]
    assert not wire.finished
    assert wire.data_to_send() == []


def test_the_last_connection_ends_the_session() -> None:
    wire = WebSocketWire((80,), "v4.channel.k8s.io")
    wire.data_to_send()
    wire.close(0)
    assert wire.finished
    assert b"".join(wire.data_to_send())[0] == 0x88


@pytest.mark.parametrize(
    ("count", "protocol"),
    [(0, "v4.channel.k8s.io"), (129, "v4.channel.k8s.io"), (6, "v4.base64.channel.k8s.io")],
)
def test_there_are_only_so_many_channels(count: int, protocol: str) -> None:
    with pytest.raises(InvalidArgument, match="ports"):
        WebSocketWire((80,) * count, protocol)
