"""Choice of a wire for an upgrade request and a ticket, without IO: protocol, version, and headers of the answer."""

from collections.abc import Callable
from typing import TypeVar

from nodeagent.errors import InvalidArgument
from nodeagent.serving import http1
from nodeagent.streaming import portforward, remotecommand, spdy, websocket
from nodeagent.streaming.backend import CommandRequest, PortForwardRequest

PROTOCOL_HEADER = "X-Stream-Protocol-Version"
ACCEPTED_HEADER = "X-Accepted-Stream-Protocol-Versions"

W = TypeVar("W")
Answer = list[tuple[str, str]]


class Refused(Exception):
    """An answer with another status than 101."""

    def __init__(self, status: int, text: str, headers: Answer | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.headers = headers or []


def command(request: http1.Request, ticket: CommandRequest) -> tuple[Answer, remotecommand.Wire]:
    """Choose the wire for exec or attach, and the headers of the answer."""
    if request.upgrade == "websocket":
        protocol, answer = _accept_websocket(request, remotecommand.WEBSOCKET_PROTOCOLS)
        return answer, remotecommand.WebSocketWire(ticket, protocol)
    protocol, answer = _accept_spdy(request, remotecommand.SPDY_PROTOCOLS)
    return answer, remotecommand.SpdyWire(ticket, protocol)


def forward(
    request: http1.Request, ticket: PortForwardRequest, clock: Callable[[], float]
) -> tuple[Answer, portforward.Wire]:
    """Choose the wire for port-forward, and the headers of the answer."""
    if request.upgrade != "websocket":
        _, answer = _accept_spdy(request, portforward.SPDY_PROTOCOLS)
        return answer, portforward.SpdyWire(spdy.Connection(), clock)
    protocols = portforward.TUNNEL_PROTOCOLS + portforward.WEBSOCKET_PROTOCOLS
    protocol, answer = _accept_websocket(request, protocols)
    if protocol in portforward.TUNNEL_PROTOCOLS:
        return answer, portforward.SpdyWire(portforward.Tunnel(), clock)
    try:
        return answer, portforward.WebSocketWire(ticket.ports, protocol)
    except InvalidArgument as error:
        raise Refused(400, str(error)) from None


def _accept_spdy(request: http1.Request, supported: tuple[str, ...]) -> tuple[str, Answer]:
    if request.upgrade != "spdy/3.1":
        raise Refused(400, "an upgrade to SPDY/3.1 or websocket is needed")
    offered = request.values(PROTOCOL_HEADER.lower())
    if not offered:
        raise Refused(400, f"{PROTOCOL_HEADER} is needed")
    protocol = _choose(offered, supported)
    if protocol is None:
        accepted = [(ACCEPTED_HEADER, name) for name in supported]
        raise Refused(403, f"none of {', '.join(offered)} is supported", accepted)
    headers = {"Connection": "Upgrade", "Upgrade": "SPDY/3.1", PROTOCOL_HEADER: protocol}
    return protocol, list(headers.items())


def _accept_websocket(request: http1.Request, supported: tuple[str, ...]) -> tuple[str, Answer]:
    """Choose a sub-protocol. A client that offers none gets none, which is the first version."""
    offered = request.values(websocket.SUBPROTOCOL_HEADER.lower())
    protocol = _choose(offered, supported)
    if offered and protocol is None:
        raise Refused(403, f"none of {', '.join(offered)} is supported")
    if request.method != "GET":
        raise Refused(405, "a WebSocket starts with GET")
    status, headers = websocket.accept(request, protocol)
    if status != 101:
        raise Refused(status, "not a handshake of a WebSocket")
    return protocol or "", headers


def _choose(offered: list[str], supported: tuple[str, ...]) -> str | None:
    """The client's first choice among the supported ones."""
    return next((name for name in offered if name in supported), None)
