"""exec, attach, port-forward and logs, as the kubelet's own API serves them on top of the agent."""

import hashlib
import os
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

from tests.kubelet.conftest import Node, built
from tests.kubelet.node import self_signed
from tests.kubelet.test_kubelet import is_ready, log
from tests.support import images

SECONDS = 60
MEBIBYTE = 1 << 20
STDOUT, STATUS = 1, 3  # channels of v4.channel.k8s.io

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(params=["spdy", "websocket"])
def wire(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def streams() -> Path:
    return built("kubelet-streams")


@pytest.fixture(scope="module", autouse=True)
def pods_that_are_ready(node: Node) -> None:
    for name in ("web", "listener"):
        node.kubelet.wait_for(name, "is ready", is_ready)


def exec_url(node: Node, *command: str, **query: int) -> str:
    return node.kubelet.url("exec", "web", "client", command=list(command), **query)


def test_exec(node: Node, streams: Path, wire: str) -> None:
    url = exec_url(node, "sh", "-c", "echo out; echo err >&2; exit 3", output=1, error=1)
    done = _run(streams, wire, "exec", url)
    assert (done.returncode, done.stdout, done.stderr) == (3, b"out\n", b"err\n")


def test_exec_there_and_back(node: Node, streams: Path, wire: str) -> None:
    data = os.urandom(8 * MEBIBYTE)
    done = _run(streams, wire, "exec", exec_url(node, "cat", input=1, output=1, error=1), data=data)
    assert done.returncode == 0, done.stderr
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()


def test_exec_with_a_terminal(node: Node, streams: Path, wire: str) -> None:
    url = exec_url(node, "sh", "-c", "tty; stty size", input=1, output=1, tty=1)
    done = _run(streams, wire, "-tty", "101x42", "exec", url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.replace(b"\r", b"") == b"/dev/pts/0\n42 101\n"


def test_exec_of_what_is_not_there(node: Node, streams: Path, wire: str) -> None:
    done = _run(streams, wire, "exec", exec_url(node, "/no/such/program", output=1, error=1))
    assert done.returncode != 0
    assert b"no such file or directory" in done.stderr


async def test_exec_over_a_websocket_that_is_passed_through(node: Node) -> None:
    """Clients of v4 and older talk to the agent itself; newer ones are translated by the kubelet."""
    url = exec_url(node, "sh", "-c", "echo out; exit 3", output=1, error=1)
    protocol = Subprotocol("v4.channel.k8s.io")
    received: dict[int, bytes] = {}
    # In one thread: that of websockets.sync reads and writes in two, and one TLS object of Python 3.13.0 failed so.
    async with connect(
        url.replace("https:", "wss:"), ssl=self_signed(), subprotocols=[protocol], max_size=None
    ) as client:
        assert client.subprotocol == protocol
        async for message in client:
            assert isinstance(message, bytes)
            received[message[0]] = received.get(message[0], b"") + message[1:]
    assert received[STDOUT] == b"out\n"
    assert re.search(rb'"reason":\s*"ExitCode",\s*"message":\s*"3"', received[STATUS])


def test_attach(node: Node, streams: Path, wire: str) -> None:
    """What is typed arrives, its echo comes back; the end of the client is not that of the container."""
    url = node.kubelet.url("attach", "listener", "listener", input=1, output=1, error=1)
    before = log(node, "listener", "listener")
    with subprocess.Popen(
        [streams, "-transport", wire, "attach", url], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        client.stdin.write(f"by {wire}\n".encode())
        client.stdin.flush()
        assert client.stdout.readline() == f"got by {wire}\n".encode()
        client.terminate()
    assert log(node, "listener", "listener") == f"{before}got by {wire}\n"


def test_port_forward(node: Node, streams: Path, wire: str) -> None:
    with _forwarded(node, streams, wire) as port, ThreadPoolExecutor(10) as pool:
        pages = set(pool.map(_page, [port] * 30))
    assert pages == {images.PAGE}


def test_logs_are_followed(node: Node, streams: Path) -> None:
    url = node.kubelet.url("containerLogs", "listener", "listener", follow="true", tailLines=1)
    say = node.kubelet.url("attach", "listener", "listener", input=1, output=1, error=1)
    with (
        urllib.request.urlopen(url, timeout=SECONDS, context=self_signed()) as following,
        subprocess.Popen([streams, "attach", say], stdin=subprocess.PIPE, stdout=-1) as client,
    ):
        assert client.stdin is not None
        client.stdin.write(b"one more\n")
        client.stdin.flush()
        assert any(line == b"got one more\n" for line in following)
        client.terminate()


def _run(
    streams: Path, wire: str, *arguments: str, data: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    command = [str(streams), "-transport", wire, *arguments]
    return subprocess.run(command, input=data, capture_output=True, timeout=SECONDS, check=False)


@contextmanager
def _forwarded(node: Node, streams: Path, wire: str) -> Iterator[int]:
    """A local port that leads to the web server of a pod."""
    url = node.kubelet.url("portForward", "web")
    command = [str(streams), "-transport", wire, "forward", url, "80"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        try:
            yield int(client.stdout.readline())
        finally:
            client.terminate()


def _page(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=SECONDS) as answer:
        return str(answer.read(), "utf-8")
