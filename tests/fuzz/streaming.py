"""Fuzz targets for everything that parses what a streaming client sends.

``python -m tests.fuzz.streaming TARGET [options of libFuzzer]`` runs one of them for as long as it is let, where
`atheris` is installed; the suite runs all of them for a moment with hypothesis. A target takes any bytes, must not
raise, and must not come to hold more than a bound.
"""

import importlib
import sys
from collections.abc import Callable, Iterator

from nodeagent.streaming import http1, portforward, remotecommand, spdy
from nodeagent.streaming.backend import ExecRequest

COMMAND = ExecRequest(container_id="c", command=("x",), stdin=True, stdout=True, tty=True)
STEP_BYTES = 4096

Receive = Callable[[bytes], object]


def _in_steps(data: bytes) -> Iterator[bytes]:
    """The first byte decides how much comes at a time."""
    step = (data[0] if data else 0) or STEP_BYTES
    for start in range(1, len(data), step):
        yield data[start : start + step]


def _feed(wire: remotecommand.Wire | portforward.Wire, data: bytes) -> None:
    for part in _in_steps(data):
        wire.receive_data(part)
        wire.data_to_send()


def http(data: bytes) -> None:
    connection = http1.HandshakeConnection()
    try:
        for part in _in_steps(data):
            if connection.receive_data(part) is not None:
                return
    except http1.BadRequest:
        connection.refuse(400, "bad request")


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


TARGETS = {
    target.__name__: target
    for target in (
        http,
        spdy_command,
        websocket_command,
        websocket_base64_command,
        spdy_forward,
        tunnel_forward,
        channels_forward,
    )
}

if __name__ == "__main__":
    atheris = importlib.import_module("atheris")
    atheris.instrument_all()
    atheris.Setup([sys.argv[0], *sys.argv[2:]], TARGETS[sys.argv[1]])
    atheris.Fuzz()
