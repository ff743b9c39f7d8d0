import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.serving.http1 import MAX_HEAD_BYTES, BadRequest, Exchange, Request
from tests.unit.streaming.recordings import SPDY_HEAD, WEBSOCKET_HEAD
from tests.unit.streaming.splits import pieces


def received(parts: list[bytes]) -> tuple[Request, bytes]:
    """The request, and what came behind it up to the part that completed it."""
    connection = Exchange()
    for part in parts:
        request = connection.receive_data(part)
        if request is not None:
            return request, connection.trailing
    raise AssertionError("no request")


def test_a_request_for_spdy() -> None:
    request, trailing = received([SPDY_HEAD + b"early"])
    assert (request.method, request.path) == ("POST", "/exec/fFq5CyQAiVsadWqSdDKIXQ")
    assert request.upgrade == "spdy/3.1"
    assert request.values("x-stream-protocol-version") == [
        "v5.channel.k8s.io",
        "v4.channel.k8s.io",
        "v3.channel.k8s.io",
        "v2.channel.k8s.io",
        "channel.k8s.io",
    ]
    assert trailing == b"early"


def test_a_request_for_websocket() -> None:
    request, _ = received([WEBSOCKET_HEAD])
    assert (request.method, request.upgrade) == ("GET", "websocket")


@given(pieces(SPDY_HEAD))
def test_borders_of_the_network_mean_nothing(parts: list[bytes]) -> None:
    assert received(parts) == received([SPDY_HEAD])


@given(st.binary(max_size=300))
def test_noise_is_a_bad_request_or_none(noise: bytes) -> None:
    try:
        Exchange().receive_data(noise)
    except BadRequest:
        pass


def test_the_query_is_no_part_of_the_path() -> None:
    request, _ = received([b"GET /exec/t?a=b HTTP/1.1\r\nHost: h\r\n\r\n"])
    assert request.path == "/exec/t"


@pytest.mark.parametrize(
    ("lines", "upgrade"),
    [
        (b"Upgrade: SPDY/3.1\r\n", ""),
        (b"Connection: keep-alive\r\nUpgrade: SPDY/3.1\r\n", ""),
        (b"Connection: keep-alive, upgrade\r\nUpgrade: SPDY/3.1\r\n", "spdy/3.1"),
        (b"Connection: Upgrade\r\nUpgrade: WebSocket, x\r\n", "websocket"),
        (b"Connection: Upgrade\r\n", ""),
    ],
)
def test_an_upgrade_needs_both_headers(lines: bytes, upgrade: str) -> None:
    request, _ = received([b"GET / HTTP/1.1\r\nHost: h\r\n" + lines + b"\r\n"])
    assert request.upgrade == upgrade


def test_a_list_may_be_on_one_line_or_on_many() -> None:
    head = b"GET / HTTP/1.1\r\nHost: h\r\nX-A: 1, 2\r\nX-B: 9\r\nX-A: ,3\r\n\r\n"
    request, _ = received([head])
    assert request.values("x-a") == ["1", "2", "3"]


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # without Host
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nbody",
        b"GET / HTTP/1.1\r\nHost: h\r\nX: " + b"x" * MAX_HEAD_BYTES,
    ],
    ids=["another protocol", "no host", "a body", "endless headers"],
)
def test_bad_requests(data: bytes) -> None:
    connection = Exchange()
    with pytest.raises(BadRequest):
        connection.receive_data(data)
    assert connection.refuse(400, "why").startswith(b"HTTP/1.1 400")


def test_switching() -> None:
    connection = Exchange()
    connection.receive_data(SPDY_HEAD)
    answer = connection.switch([("Upgrade", "SPDY/3.1"), ("Connection", "Upgrade")])
    status, *headers = answer.decode().split("\r\n")
    assert status == "HTTP/1.1 101 Switching Protocols"
    assert headers == ["Upgrade: SPDY/3.1", "Connection: Upgrade", "", ""]


def test_the_answer_to_head_has_no_body() -> None:
    exchange = Exchange()
    exchange.receive_data(b"HEAD / HTTP/1.1\r\nHost: h\r\n\r\n")
    head, _, body = exchange.answer(200, b"body", [("X", "y")]).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert b"content-length: 4" in head
    assert b"connection: close" in head
    assert body == b""


def test_a_refusal_is_a_whole_answer() -> None:
    connection = Exchange()
    connection.receive_data(SPDY_HEAD)
    head, _, body = connection.refuse(404, "no", [("X", "y")]).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 404")
    assert b"X: y" in head
    assert b"content-length: 3" in head
    assert body == b"no\n"
