"""Messages over a socket pair: what goes in comes out, what is malformed is refused, nothing is left open."""

import asyncio
import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent import errors
from nodeagent.sandbox import protocol
from nodeagent.sandbox.agent.channel import Channel
from nodeagent.sandbox.protocol import Body, Message
from nodeagent.sandbox.runtime import peers
from nodeagent.sandbox.runtime.loop import Loop

Pair = tuple[socket.socket, socket.socket]

TEXTS = st.text(
    st.characters(exclude_categories=[])
)  # lone surrogates, too: bytes that are no UTF-8
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        yield left, right


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def exchange(pair: Pair, body: Body, fds: list[int] | None = None) -> Message:
    protocol.send(pair[0], protocol.encode(body), fds or [])
    message = protocol.receive(pair[1])
    assert message is not None
    return message


@given(st.dictionaries(TEXTS, VALUES, max_size=5))
def test_a_message_arrives_as_it_was(body: Body) -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        assert exchange((left, right), body) == (body, [])


@pytest.mark.parametrize("size", [1, 32 << 10, 33 << 10, 512 << 10])
def test_size_does_not_matter(pair: Pair, size: int) -> None:
    assert exchange(pair, {"text": "x" * size}).body == {"text": "x" * size}


def test_a_message_has_a_bound() -> None:
    with pytest.raises(errors.ResourceExhausted, match="longer than"):
        protocol.encode({"text": "x" * protocol.MAX_MESSAGE_BYTES})


@pytest.mark.parametrize("size", [10, 100_000])
def test_descriptors_keep_their_order_and_are_closed_on_exec(pair: Pair, size: int) -> None:
    pipes = [os.pipe() for _ in range(3)]
    message = exchange(pair, {"text": "x" * size}, [writer for _, writer in pipes])
    for number, (descriptor, (reader, writer)) in enumerate(zip(message.fds, pipes, strict=True)):
        assert not os.get_inheritable(descriptor)
        os.write(descriptor, bytes([number]))
        assert os.read(reader, 10) == bytes([number])
        protocol.close_all([descriptor, reader, writer])


def test_the_end_of_a_connection(pair: Pair) -> None:
    pair[0].close()
    assert protocol.receive(pair[1]) is None


@pytest.mark.parametrize(
    "packet",
    [b"\0", b"{", b"[]", b"17", b"\xff\xfe", b"[" * 20_000, b"x" * 40_000, b'{"a": 1} {"b": 2}'],
)
def test_what_is_malformed_is_refused(pair: Pair, packet: bytes) -> None:
    pair[0].send(packet)
    with pytest.raises(ValueError, match=r"."):
        protocol.receive(pair[1])


def test_a_refused_message_leaves_nothing_open(pair: Pair) -> None:
    before = open_descriptors()
    protocol._send(pair[0], b"[]", [0, 1, 2])
    with pytest.raises(ValueError, match="not an object"):
        protocol.receive(pair[1])
    assert open_descriptors() == before


def test_too_many_descriptors_are_refused(pair: Pair) -> None:
    before = open_descriptors()
    protocol._send(pair[0], b"{}", [0] * (protocol.MAX_DESCRIPTORS + 2))
    with pytest.raises(ValueError, match="too many"):
        protocol.receive(pair[1])
    assert open_descriptors() == before


def test_a_long_message_in_a_file_has_a_bound_too(pair: Pair) -> None:
    memfd = os.memfd_create("long")
    os.truncate(memfd, protocol.MAX_MESSAGE_BYTES + 1)
    protocol._send(pair[0], b"\0", [memfd])
    os.close(memfd)
    with pytest.raises(ValueError, match="longer than"):
        protocol.receive(pair[1])


@pytest.mark.parametrize(
    "error",
    [
        errors.NotFound('container "x": not there'),
        errors.StartError("exec"),
        errors.NodeAgentError("text"),
        TimeoutError("late"),
        FileNotFoundError(2, "No such file or directory", "/nowhere"),
        OSError(5, "Input/output error"),
    ],
)
def test_errors_keep_their_class_and_text(error: Exception) -> None:
    read = protocol.read_error(protocol.describe_error(error))
    assert (type(read), str(read)) == (type(error), str(error))


def test_an_unknown_error_becomes_the_general_one() -> None:
    read = protocol.read_error(protocol.describe_error(ZeroDivisionError("by zero")))
    assert type(read) is errors.NodeAgentError
    assert "by zero" in str(read)
    assert type(protocol.read_error({"error": "annotations", "text": "x"})) is errors.NodeAgentError


def test_a_path_of_any_length_is_an_address(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("x" * 150)
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        with protocol.address(f"{directory}/socket") as address:
            listener.bind(address)
        listener.listen()
        with protocol.address(f"{directory}/socket") as address:
            client.connect(address)


@pytest.mark.parametrize(
    "body",
    [
        {"result": {}},
        {"id": None, "error": "InvalidArgument", "text": "not understood"},
        {"id": [], "result": {}},
        {"id": 1},
        {"id": 1, "result": []},
        {"id": 1, "result": {}},
        {"id": 1, "result": {"fds": "ab"}},
        {"id": 1, "result": {"fds": ["a"]}},
        {"id": 1, "result": {"fds": ["a", "a"]}},
        {"id": 1, "result": {"fds": [[], {}]}},
        {"id": 1, "error": [], "text": "x"},
        {"id": 1, "error": "NotFound"},
    ],
)
async def test_a_malformed_reply_ends_the_connection(pair: Pair, body: Body) -> None:
    """The agent cannot know what else of it was meant; who waits is told, and no descriptor stays."""
    ended = asyncio.Event()
    before = open_descriptors()
    channel = Channel(pair[0].dup(), "supervisor", lambda _event: None, ended.set)
    protocol.send(pair[1], protocol.encode(body), [pair[1].fileno()] * 2)
    with pytest.raises(errors.Unavailable, match="supervisor"):
        await channel.request("state")
    await ended.wait()
    channel.forget()
    assert open_descriptors() == before


def test_the_text_of_an_error_is_bounded(pair: Pair) -> None:
    """Or the reply that says what was wrong with the longest request would be too long itself."""
    answers: list[Message] = []
    peer = peers.Peer(
        Loop(),
        pair[1],
        lambda peer, message: peers.perform("x", {}, peer, message),
        lambda _peer: None,
    )
    name = "\x01" * (protocol.MAX_MESSAGE_BYTES // 6 - 100)
    protocol.send(pair[0], protocol.encode({"id": 1, "op": name}))
    protocol.send(pair[0], protocol.encode({"id": name, "op": "x"}))
    pair[0].shutdown(socket.SHUT_WR)
    peer.drain()
    while answer := protocol.receive(pair[0]):
        answers.append(answer)
    assert [answer.body["id"] for answer in answers] == [1, None]
    assert all(answer.body["error"] == "InvalidArgument" for answer in answers)
