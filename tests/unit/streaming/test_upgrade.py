import pytest

from nodeagent.serving import http1
from nodeagent.streaming import portforward, remotecommand, upgrade
from nodeagent.streaming.backend import ExecRequest, PortForwardRequest
from nodeagent.streaming.upgrade import Refused

EXEC = ExecRequest(container_id="c", command=("x",), stdin=True, stdout=True)
FORWARD = PortForwardRequest(sandbox_id="s", ports=(80,))


def spdy(*protocols: str) -> http1.Request:
    headers = [("connection", "Upgrade"), ("upgrade", "SPDY/3.1")]
    headers += [("x-stream-protocol-version", protocol) for protocol in protocols]
    return http1.Request("POST", "/", tuple(headers))


def websocket(*protocols: str, method: str = "GET") -> http1.Request:
    headers = [
        ("connection", "Upgrade"),
        ("upgrade", "websocket"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-key", "B3TLitF/japKAlbm5ZdP6w=="),
    ]
    if protocols:
        headers.append(("sec-websocket-protocol", ", ".join(protocols)))
    return http1.Request(method, "/", tuple(headers))


def clock() -> float:
    return 0.0


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        (
            ["v5.channel.k8s.io", "v4.channel.k8s.io", "v3.channel.k8s.io", "channel.k8s.io"],
            "v4.channel.k8s.io",
        ),
        (["v5.channel.k8s.io,v3.channel.k8s.io"], "v3.channel.k8s.io"),
        (["v2.channel.k8s.io", "v4.channel.k8s.io"], "v2.channel.k8s.io"),
        (["channel.k8s.io"], "channel.k8s.io"),
    ],
)
def test_a_spdy_command_has_the_clients_first_choice(offered: list[str], chosen: str) -> None:
    answer, wire = upgrade.command(spdy(*offered), EXEC)
    assert isinstance(wire, remotecommand.SpdyWire)
    assert answer == [
        ("Connection", "Upgrade"),
        ("Upgrade", "SPDY/3.1"),
        ("X-Stream-Protocol-Version", chosen),
    ]


@pytest.mark.parametrize(
    "chosen",
    [
        "v5.channel.k8s.io",
        "v4.channel.k8s.io",
        "v4.base64.channel.k8s.io",
        "base64.channel.k8s.io",
        "channel.k8s.io",
    ],
)
def test_a_websocket_command(chosen: str) -> None:
    answer, wire = upgrade.command(websocket("v9.channel.k8s.io", chosen), EXEC)
    assert isinstance(wire, remotecommand.WebSocketWire)
    assert ("Sec-WebSocket-Protocol", chosen) in answer


def test_a_websocket_without_sub_protocol() -> None:
    answer, wire = upgrade.command(websocket(), EXEC)
    assert isinstance(wire, remotecommand.WebSocketWire)
    assert "Sec-WebSocket-Protocol" not in dict(answer)


@pytest.mark.parametrize(
    ("request_", "wire"),
    [
        (spdy("portforward.k8s.io"), portforward.SpdyWire),
        (websocket("SPDY/3.1+portforward.k8s.io"), portforward.SpdyWire),
        (websocket("v4.channel.k8s.io"), portforward.WebSocketWire),
        (websocket(), portforward.WebSocketWire),
    ],
)
def test_forwards(request_: http1.Request, wire: type) -> None:
    assert isinstance(upgrade.forward(request_, FORWARD, clock)[1], wire)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (http1.Request("GET", "/", ()), 400),
        (http1.Request("GET", "/", (("connection", "upgrade"), ("upgrade", "h2c"))), 400),
        (spdy(), 400),
        (spdy("v9.channel.k8s.io"), 403),
        (websocket("v9.channel.k8s.io"), 403),
        (websocket("v5.channel.k8s.io", method="POST"), 405),
        (http1.Request("GET", "/", websocket().headers[:2]), 400),
    ],
    ids=["none", "other", "no protocol", "spdy", "websocket", "method", "no key"],
)
def test_refusals(request_: http1.Request, status: int) -> None:
    with pytest.raises(Refused) as refusal:
        upgrade.command(request_, EXEC)
    assert refusal.value.status == status


def test_a_refusal_names_what_would_do() -> None:
    with pytest.raises(Refused) as refusal:
        upgrade.forward(spdy("v4.channel.k8s.io"), FORWARD, clock)
    assert refusal.value.headers == [
        ("X-Accepted-Stream-Protocol-Versions", "portforward.k8s.io"),
    ]


def test_channels_need_ports() -> None:
    with pytest.raises(Refused) as refusal:
        upgrade.forward(websocket("v4.channel.k8s.io"), PortForwardRequest(sandbox_id="s"), clock)
    assert refusal.value.status == 400


def test_a_header_that_only_h11_takes_is_a_bad_request() -> None:
    usual = websocket("v5.channel.k8s.io")
    request = http1.Request("GET", "/", (*usual.headers, ("cookie", "a\x7fb")))
    with pytest.raises(Refused) as refusal:
        upgrade.command(request, EXEC)
    assert refusal.value.status == 400
