"""Much at once: a GiB there and back, and many connections, with the memory that it takes of the agent and the pod."""

import hashlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nodeagent.api import runtime_pb2 as pb
from tests.e2e.streams import Streams
from tests.support import images
from tests.support.cri import Container, Cri, Pod
from tests.support.node import wait_for
from tests.support.registry import Registry

MEBIBYTE = 1 << 20
BULK_MEBIBYTES = 1024
SAMPLE_BYTES = 16 * MEBIBYTE
MAX_GROWTH_BYTES = 16 * MEBIBYTE
CONNECTIONS = 50
ECHO_PORT = 9000

Write = Callable[[bytes], object]
Read = Callable[[int], bytes]


pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def echo(cri: Cri) -> Iterator[Container]:
    """Sends back what comes to its port."""
    made = cri.run("nc", "-ll", "-p", str(ECHO_PORT), "-e", "cat")
    yield made
    made.pod.remove()


def test_a_gibibyte_through_exec(streams: Streams, cri: Cri, echo: Container) -> None:
    with streams.running("exec", "-i", echo.id, "cat") as client:
        assert client.stdin is not None
        assert client.stdout is not None
        read = client.stdout.read1  # type: ignore[attr-defined]
        there_and_back(cri, echo.pod, client.stdin.write, client.stdin.close, read)
        assert client.wait(timeout=60) == 0


def test_a_gibibyte_through_port_forward(streams: Streams, cri: Cri, echo: Container) -> None:
    with streams.forwarding(echo.pod.id, ECHO_PORT) as port:
        wait_for("the port", lambda: echoes(port))
        with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
            there_and_back(
                cri, echo.pod, client.sendall, lambda: client.shutdown(socket.SHUT_WR), client.recv
            )


def test_many_connections(streams: Streams, cri: Cri, registry: Registry, tmp_path: Path) -> None:
    """50 of curl at once, each with a body of a MiB from a real nginx."""
    server = nginx(cri, registry)
    server.said("start worker process")
    wanted = server.shell(f"head -c {MEBIBYTE} /dev/urandom > /srv/file; sha256sum /srv/file")
    with streams.forwarding(server.pod.id, 80) as port:
        wait_for("the port", lambda: connects(port))
        arguments = ["--silent", "--fail", "--noproxy", "*", "--parallel", "--parallel-immediate"]
        arguments += ["--parallel-max", str(CONNECTIONS), "--write-out", "%{num_connects}\n"]
        arguments += [
            "--output",
            f"{tmp_path}/#1",
            f"http://127.0.0.1:{port}/file?[1-{CONNECTIONS}]",
        ]
        done = subprocess.run(["curl", *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"] * CONNECTIONS
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in tmp_path.iterdir()]
    assert digests == [wanted.split()[0]] * CONNECTIONS
    server.pod.remove()


def nginx(cri: Cri, registry: Registry) -> Container:
    image = images.nginx()
    spec = pb.ImageSpec(image=f"{registry.host}/{image.repository}:{image.tags[0]}")
    cri.agent.images.PullImage(pb.PullImageRequest(image=spec), timeout=60)
    return cri.run("nginx", "-g", "daemon off;", image=spec)


def connects(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=60).close()
    except ConnectionRefusedError:
        return False
    return True


def echoes(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
            client.sendall(b"x")
            return client.recv(1) == b"x"
    except OSError:
        return False


def there_and_back(cri: Cri, pod: Pod, write: Write, end: Callable[[], object], read: Read) -> None:
    """A GiB comes back as it was sent, and neither the agent nor the pod's supervisor keeps any of it.

    For a while nobody reads: all between the two ends must wait.
    """
    processes = cri.agent.pid, pod.supervisor
    before = [resident_bytes(pid) for pid in processes]
    highest, received, sampled = before, 0, -SAMPLE_BYTES
    digest = hashlib.sha256()
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(send, write, end)
        time.sleep(1)
        while data := read(MEBIBYTE):
            digest.update(data)
            received += len(data)
            if received - sampled >= SAMPLE_BYTES:
                sampled = received
                highest = list(map(max, highest, map(resident_bytes, processes)))
        assert digest.hexdigest() == sent.result()
    assert received == BULK_MEBIBYTES * MEBIBYTE
    growth = [most - least for most, least in zip(highest, before, strict=True)]
    assert max(growth) < MAX_GROWTH_BYTES, growth


def send(write: Write, end: Callable[[], object]) -> str:
    """A GiB in which no MiB is like another; returns its digest."""
    digest, rest = hashlib.sha256(), os.urandom(MEBIBYTE - 8)
    for number in range(BULK_MEBIBYTES):
        chunk = number.to_bytes(8, "big") + rest
        digest.update(chunk)
        write(chunk)
    end()
    return digest.hexdigest()


def resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) << 10
