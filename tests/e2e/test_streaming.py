"""exec, attach and port-forward with the real crictl, over both wires."""

import hashlib
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nodeagent.api import runtime_pb2 as pb
from tests.e2e.streams import Streams
from tests.support.cri import RUNNING, Container, Cri
from tests.support.node import wait_for

MEBIBYTE = 1 << 20


@pytest.fixture(scope="module")
def container(cri: Cri) -> Iterator[Container]:
    made = cri.run()
    yield made
    made.pod.remove()


def test_exec(streams: Streams, container: Container) -> None:
    script = "echo out; echo err >&2; exit 3"
    arguments = streams.command("exec", container.id, "sh", "-c", script)
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "out\n"
    assert "err\n" in done.stderr
    assert "exit code 3" in done.stderr


def test_bytes_there_and_back(streams: Streams, container: Container) -> None:
    data = os.urandom(MEBIBYTE) * 64
    arguments = streams.command("exec", "-i", container.id, "cat")
    done = subprocess.run(arguments, input=data, capture_output=True, timeout=60, check=True)
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(data).digest()


def test_attach(streams: Streams, cri: Cri) -> None:
    reader = cri.run(
        "sh", "-c", "while read line; do echo got $line; done; exit 4", stdin=True, stdin_once=True
    )
    arguments = streams.command("attach", "-i", reader.id)
    done = subprocess.run(
        arguments, input="one\ntwo\n", capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.splitlines() == ["got one", "got two"]
    assert reader.ended().exit_code == 4
    assert reader.output.splitlines() == ["got one", "got two"]
    reader.pod.remove()


def test_attach_to_what_goes_on(streams: Streams, cri: Cri) -> None:
    """A client whose input ends leaves, with the answer; the container reads on."""
    reader = cri.run("sh", "-c", "while read line; do echo got $line; done", stdin=True)
    arguments = streams.command("attach", "-i", reader.id)
    for word in ("one", "two"):
        done = subprocess.run(
            arguments, input=f"{word}\n", capture_output=True, text=True, timeout=60, check=True
        )
        assert done.stdout == f"got {word}\n"
    assert reader.status.state == RUNNING
    reader.pod.remove()


def test_who_is_attached_hears_of_the_death_of_the_supervisor(streams: Streams, cri: Cri) -> None:
    """Of what goes on nothing would come any more."""
    reader = cri.run("sh", "-c", "while read line; do echo got $line; done", stdin=True)
    with streams.running("attach", "-i", reader.id) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        client.stdin.write(b"one\n")
        client.stdin.flush()
        assert client.stdout.readline() == b"got one\n"
        os.kill(reader.pod.supervisor, signal.SIGKILL)
        assert client.stderr is not None
        assert b"the connection to its supervisor has ended; attach again" in client.stderr.read()
        assert client.wait() == 1
    assert reader.status.state == RUNNING
    reader.pod.remove()


def test_who_does_not_read_is_told_so(streams: Streams, cri: Cri) -> None:
    """Neither the container nor its log waits for a client, and a client does not wait for what it has missed."""
    script = f"read go; head -c {32 * MEBIBYTE} /dev/zero; echo; echo written; sleep 1000"
    writer = cri.run("sh", "-c", script, stdin=True)
    with streams.running("attach", "-i", writer.id) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        assert client.stderr is not None
        client.stdin.write(b"go\n")
        client.stdin.flush()
        writer.said("written")
        assert len(client.stdout.read()) < 32 * MEBIBYTE
        assert b"its output was read too slowly" in client.stderr.read()
        assert client.wait() == 1
    assert writer.status.state == RUNNING
    writer.pod.remove()


def test_port_forward(streams: Streams, cri: Cri) -> None:
    script = "head -c 1000000 /dev/urandom > /new; mv /new /file; exec httpd -f -p 8080 -h /"
    server = cri.run("sh", "-c", script)
    wait_for("the server", lambda: server.exec("test", "-s", "/file").exit_code == 0)
    wanted = server.shell("sha256sum /file").split()[0]
    with streams.forwarding(server.pod.id, 8080) as port:
        wait_for("the port", lambda: digest(port) == wanted)
        with ThreadPoolExecutor(20) as pool:
            assert set(pool.map(digest, [port] * 50)) == {wanted}
    server.pod.remove()


def test_an_exec_outlives_the_agent(crictl: Path, own_cri: Cri) -> None:
    container = own_cri.run()
    script = "echo begun > /begun; sleep 2; echo done > /proof"
    arguments = Streams(crictl, own_cri, "spdy").command("exec", container.id, "sh", "-c", script)
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


def digest(port: int) -> str:
    """The digest of what the forwarded server has; empty while it cannot be reached."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/file", timeout=60) as answer:
            return hashlib.sha256(answer.read()).hexdigest()
    except OSError:
        return ""
