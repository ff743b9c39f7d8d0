"""exec, attach and port-forward with the real crictl, over both wires."""

import hashlib
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from nodeagent.api import runtime_pb2 as pb
from tests.cri import Container, Cri
from tests.node import free_port, wait_for

WIRES = ("spdy", "websocket")
MEBIBYTE = 1 << 20


@pytest.fixture(params=WIRES)
def wire(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def container(cri: Cri) -> Iterator[Container]:
    made = cri.run()
    yield made
    made.pod.remove()


def command(crictl: Path, cri: Cri, verb: str, wire: str, *arguments: str) -> list[str]:
    endpoint = cri.agent.endpoint
    return [str(crictl), "-r", endpoint, "-i", endpoint, verb, "--transport", wire, *arguments]


def test_exec(crictl: Path, cri: Cri, container: Container, wire: str) -> None:
    script = "echo out; echo err >&2; exit 3"
    arguments = command(crictl, cri, "exec", wire, container.id, "sh", "-c", script)
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout == "out\n"
    assert "err\n" in done.stderr
    assert "exit code 3" in done.stderr


def test_bytes_there_and_back(crictl: Path, cri: Cri, container: Container, wire: str) -> None:
    data = os.urandom(MEBIBYTE) * 64
    arguments = command(crictl, cri, "exec", wire, "-i", container.id, "cat")
    done = subprocess.run(arguments, input=data, capture_output=True, timeout=60, check=True)
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()


def test_attach(crictl: Path, cri: Cri, wire: str) -> None:
    reader = cri.run(
        "sh", "-c", "while read line; do echo got $line; done; exit 4", stdin=True, stdin_once=True
    )
    arguments = command(crictl, cri, "attach", wire, "-i", reader.id)
    done = subprocess.run(
        arguments, input="one\ntwo\n", capture_output=True, text=True, timeout=30, check=False
    )
    assert done.stdout.splitlines() == ["got one", "got two"]
    assert reader.ended().exit_code == 4
    assert reader.output.splitlines() == ["got one", "got two"]
    reader.pod.remove()


def test_port_forward(crictl: Path, cri: Cri, wire: str) -> None:
    script = "head -c 1000000 /dev/urandom > /file; exec httpd -f -p 8080 -h /"
    server = cri.run("sh", "-c", script)
    wait_for("the server", lambda: server.exec("test", "-s", "/file").exit_code == 0)
    wanted = server.shell("sha256sum /file").split()[0]
    port = free_port()
    with forwarding(command(crictl, cri, "port-forward", wire, server.pod.id, f"{port}:8080")):
        wait_for("the port", lambda: digest(port) == wanted)
        with ThreadPoolExecutor(20) as pool:
            assert set(pool.map(digest, [port] * 50)) == {wanted}
    server.pod.remove()


def test_an_exec_outlives_the_agent(crictl: Path, own_cri: Cri) -> None:
    container = own_cri.run()
    script = "echo begun > /begun; sleep 2; echo done > /proof"
    arguments = command(crictl, own_cri, "exec", "spdy", container.id, "sh", "-c", script)
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        wait_for("the command", lambda: container.exec("test", "-s", "/begun").exit_code == 0)
        # its session must have been answered: a client that leaves before ends its command
        time.sleep(0.5)
        own_cri.agent.restart()
    wait_for("its proof", lambda: container.exec("test", "-s", "/proof").exit_code == 0)


def test_urls_have_a_host(cri: Cri, container: Container) -> None:
    request = pb.ExecRequest(container_id=container.id, cmd=["true"], stdout=True)
    url = cri.agent.runtime.Exec(request).url
    assert url.startswith("http://127.0.0.1:")


@contextmanager
def forwarding(arguments: list[str]) -> Iterator[None]:
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=10)


def digest(port: int) -> str:
    """Of what the forwarded server has; empty while it cannot be reached."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/file", timeout=20) as answer:
            return hashlib.sha256(answer.read()).hexdigest()
    except OSError:
        return ""
