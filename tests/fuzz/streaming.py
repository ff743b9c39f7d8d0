"""What a streaming client sends, from its request on."""

from collections.abc import Callable

from websockets.frames import Frame, Opcode

from nodeagent.serving import http1
from nodeagent.streaming import portforward, remotecommand, spdy, upgrade
from nodeagent.streaming.backend import ExecRequest, PortForwardRequest
from tests.fuzz.target import Target, in_steps

COMMAND = ExecRequest(container_id="c", command=("x",), stdin=True, stdout=True, tty=True)
FORWARD = PortForwardRequest(sandbox_id="s", ports=(80, 443))

Receive = Callable[[bytes], object]


def _feed(wire: remotecommand.Wire | portforward.Wire, data: bytes) -> None:
    for part in in_steps(data):
        wire.receive_data(part)
        wire.data_to_send()


def http_command(data: bytes) -> None:
    _shake(data, lambda request: upgrade.command(request, COMMAND)[0])


def http_forward(data: bytes) -> None:
    _shake(data, lambda request: upgrade.forward(request, FORWARD, lambda: 0.0)[0])


def _shake(data: bytes, agree: Callable[[http1.Request], upgrade.Answer]) -> None:
    connection = http1.Exchange()
    try:
        for part in in_steps(data):
            request = connection.receive_data(part)
            if request is not None:
                connection.switch(agree(request))
                return
    except http1.BadRequest as error:
        connection.refuse(400, str(error))
    except upgrade.Refused as refusal:
        connection.refuse(refusal.status, refusal.text, refusal.headers)


def spdy_command(data: bytes) -> None:
    _feed(remotecommand.SpdyWire(COMMAND, "v4.channel.k8s.io"), data)


def websocket_command(data: bytes) -> None:
    _feed(remotecommand.WebSocketWire(COMMAND, "v5.channel.k8s.io"), data)


def websocket_base64_command(data: bytes) -> None:
    _feed(remotecommand.WebSocketWire(COMMAND, "v4.base64.channel.k8s.io"), data)


def spdy_forward(data: bytes) -> None:
    _feed(portforward.SpdyWire(spdy.Connection(), lambda: 0.0), data)


def tunnel_forward(data: bytes) -> None:
    _feed(portforward.SpdyWire(portforward.Tunnel(), lambda: 0.0), data)


def channels_forward(data: bytes) -> None:
    _feed(portforward.WebSocketWire((80, 443), "v4.channel.k8s.io"), data)


# --- examples ---


def request(upgraded: str, *headers: str) -> bytes:
    lines = (
        "GET /exec/token?x=1 HTTP/1.1",
        "Host: a",
        "Connection: Upgrade",
        f"Upgrade: {upgraded}",
    )
    return b"\0" + "\r\n".join((*lines, *headers, "", "")).encode()


def websocket_request(protocols: str) -> bytes:
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
    version = "Sec-WebSocket-Version: 13"
    return request("websocket", key, version, f"Sec-WebSocket-Protocol: {protocols}")


def spdy_request(protocols: str) -> bytes:
    return request("SPDY/3.1", f"X-Stream-Protocol-Version: {protocols}")


def spdy_session(*streams: dict[str, str]) -> bytes:
    client = spdy.Connection(client=True)
    for headers in streams:
        stream = client.open(headers)
        client.send_data(stream, b'{"Width":80,"Height":24}')
        client.end(stream)
    client.ping(1)
    client.go_away()
    return b"".join(client.data_to_send())


def websocket_session(*messages: bytes) -> bytes:
    return b"".join(Frame(Opcode.BINARY, data).serialize(mask=True) for data in messages)


COMMAND_STREAMS = spdy_session(*({"streamtype": kind} for kind in ("error", "stdin", "resize")))
FORWARD_STREAMS = spdy_session(
    *({"streamtype": kind, "port": "80", "requestid": "1"} for kind in ("error", "data"))
)
COMMAND_CHANNELS = websocket_session(b"\0in", b'\4{"Width":80,"Height":24}', b"\xff\0")
BASE64_CHANNELS = websocket_session(b"0aW4=", b"4eyJXaWR0aCI6ODB9")

TARGETS = (
    Target(
        http_command,
        (),
        (spdy_request("v4.channel.k8s.io, v3"), websocket_request("v5.channel.k8s.io")),
    ),
    Target(
        http_forward,
        (),
        (
            spdy_request("portforward.k8s.io"),
            websocket_request("SPDY/3.1+portforward.k8s.io"),
            websocket_request("v4.channel.k8s.io"),
        ),
    ),
    Target(spdy_command, (), (b"\0" + COMMAND_STREAMS,)),
    Target(websocket_command, (), (b"\0" + COMMAND_CHANNELS,)),
    Target(websocket_base64_command, (), (b"\0" + BASE64_CHANNELS,)),
    Target(spdy_forward, (), (b"\0" + FORWARD_STREAMS,)),
    Target(tunnel_forward, (), (b"\0" + websocket_session(FORWARD_STREAMS),)),
    Target(channels_forward, (), (b"\0" + websocket_session(b"\0\x50\0", b"\1x"),)),
)
