"""Clients that take up connections and say nothing, or read nothing, while others want to be served.

The agent's table of descriptors is made small, as it is on a machine with a low limit, so that a few thousand clients
are more than it could hold.
"""

import errno
import os
import resource
import selectors
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest

from nodeagent.api import runtime_pb2 as pb
from nodeagent.api import runtime_pb2_grpc as rpc
from nodeagent.lifecycle.events import MAX_READERS
from tests.e2e.conftest import client, running_agent
from tests.e2e.streams import WIRES, Streams
from tests.security.agent.test_processes import peak_bytes, reset_peak
from tests.support import images
from tests.support.cri import Container, Cri
from tests.support.node import RunningAgent, wait_for
from tests.support.registry import Registry

DESCRIPTORS = 1024
CLIENTS = 3000
MEBIBYTE = 1 << 20


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory, registry: Registry) -> Iterator[RunningAgent]:
    with running_agent(tmp_path_factory, registry) as running:
        resource.prlimit(running.pid, resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
        yield running
        assert "Traceback" not in running.log.read_text()


@pytest.fixture(scope="module")
def cri(agent: RunningAgent, registry: Registry) -> Cri:
    return client(agent, registry)


@pytest.fixture(scope="module")
def container(cri: Cri) -> Container:
    return cri.run()


def address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def streaming_address(container: Container) -> tuple[str, int]:
    request = pb.ExecRequest(container_id=container.id, cmd=["true"], stdout=True)
    url: str = container.pod.cri.agent.runtime.Exec(request, timeout=60).url
    return address(url.split("/")[2])


@contextmanager
def idle_clients(target: tuple[str, int] | str, said: bytes = b"") -> Iterator[list[socket.socket]]:
    """Thousands that are connected, or are about to be, and have said nothing more than this."""
    family = socket.AF_UNIX if isinstance(target, str) else socket.AF_INET
    with ExitStack() as held:
        clients = []
        for _ in range(CLIENTS):
            one = held.enter_context(socket.socket(family, socket.SOCK_STREAM))
            one.setblocking(False)
            # A Unix socket with a full queue says EAGAIN, and is not connected.
            if one.connect_ex(target) in (0, errno.EINPROGRESS):
                clients.append(one)
                if said:
                    try:
                        one.send(said)
                    except BlockingIOError:
                        pass
        yield clients


def is_closed(one: socket.socket) -> bool:
    try:
        return one.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def descriptors(agent: RunningAgent) -> int:
    return len(os.listdir(f"/proc/{agent.pid}/fd"))


def is_served(container: Container) -> None:
    """A client of the CRI that comes only now has its calls answered."""
    agent = container.pod.cri.agent
    with grpc.insecure_channel(agent.endpoint) as channel:
        runtime = rpc.RuntimeServiceStub(channel)
        runtime.Version(pb.VersionRequest(), timeout=60, wait_for_ready=True)
        request = pb.ExecSyncRequest(container_id=container.id, cmd=["true"], timeout=10)
        assert runtime.ExecSync(request, timeout=60).exit_code == 0
    container.pod.cri.run().pod.remove()


def scraped(agent: RunningAgent) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{agent.metrics}/metrics", timeout=60) as answer:
        text: str = answer.read().decode()
        return text


def test_idle_clients_of_the_metrics(agent: RunningAgent, container: Container) -> None:
    before = descriptors(agent)
    with idle_clients(address(agent.metrics)) as clients:
        wait_for("the end of the oldest", lambda: is_closed(clients[0]))
        is_served(container)
        assert "nodeagent_pods" in scraped(agent)
        is_served(container)
        assert descriptors(agent) < before + 100


def test_metrics_that_are_asked_for_and_not_read(agent: RunningAgent, container: Container) -> None:
    """Requests without end on each connection, whose answers nobody takes."""
    scraped(agent)
    size = reset_peak(agent.pid)
    requests = b"GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n" * 1000
    with idle_clients(address(agent.metrics), requests) as clients:
        for one in clients[:100]:
            one.setblocking(True)
            one.settimeout(0.1)
            try:
                one.sendall(requests * 100)
            except OSError:
                pass
        is_served(container)
        wait_for("a scrape", lambda: "nodeagent_pods" in attempt(agent))
        assert peak_bytes(agent.pid) - size < 100 * MEBIBYTE


def attempt(agent: RunningAgent) -> str:
    """A scrape; empty where its connection is closed."""
    try:
        return scraped(agent)
    except OSError:
        return ""


@pytest.mark.parametrize("wire", WIRES)
def test_idle_clients_of_the_streaming_server(
    crictl: Path, agent: RunningAgent, cri: Cri, container: Container, wire: str
) -> None:
    before = descriptors(agent)
    with idle_clients(streaming_address(container)) as clients:
        wait_for("the end of the oldest", lambda: is_closed(clients[0]))
        arguments = Streams(crictl, cri, wire).command("exec", container.id, "echo", "hello")
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
        assert done.stdout == "hello\n", done.stderr
        is_served(container)
        assert descriptors(agent) < before + 400


@contextmanager
def returning_clients(target: tuple[str, int], count: int) -> Iterator[None]:
    """Many silent clients, each of which connects again as soon as it is closed."""
    over = threading.Event()

    def come_back() -> None:
        with selectors.DefaultSelector() as selector, ExitStack() as held:
            waiting = count
            while not over.is_set():
                for _ in range(waiting):
                    one = held.enter_context(socket.socket())
                    one.setblocking(False)
                    one.connect_ex(target)
                    selector.register(one, selectors.EVENT_READ)
                closed = [key.fileobj for key, _ in selector.select(0.1)]
                waiting = len(closed)
                for file in closed:
                    selector.unregister(file)
                    assert isinstance(file, socket.socket)
                    file.close()

    thread = threading.Thread(target=come_back)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_clients_that_come_back(
    crictl: Path, agent: RunningAgent, cri: Cri, container: Container
) -> None:
    with (
        returning_clients(streaming_address(container), 600),
        returning_clients(address(agent.metrics), 600),
    ):
        is_served(container)
        for wire in WIRES:
            arguments = Streams(crictl, cri, wire).command("exec", container.id, "echo", "hello")
            done = subprocess.run(arguments, capture_output=True, timeout=60, check=True)
            assert done.stdout == b"hello\n"
        assert "nodeagent_pods" in scraped(agent)
        is_served(container)


# --- sockets of root ---


def test_idle_clients_of_the_cri(agent: RunningAgent, container: Container) -> None:
    """The clients of a faulty program, since clients are trusted. Other clients are served, new ones after a while."""
    before = descriptors(agent)
    with idle_clients(str(agent.socket)) as clients:
        wait_for("the end of some", lambda: any(map(is_closed, clients)))
        for _ in range(10):
            assert container.exec("true").exit_code == 0
        assert descriptors(agent) < before + 400
        is_served(container)


def test_readers_of_events_that_do_not_read(agent: RunningAgent, container: Container) -> None:
    with grpc.insecure_channel(agent.endpoint) as channel:
        runtime = rpc.RuntimeServiceStub(channel)
        streams = [runtime.GetContainerEvents(pb.GetEventsRequest()) for _ in range(CLIENTS)]
        wait_for(
            "refusals of all but a few",
            lambda: sum(stream.is_active() for stream in streams) <= MAX_READERS,
            seconds=60,
        )
        is_served(container)
        for stream in streams:
            stream.cancel()


def test_idle_clients_of_the_control_socket(agent: RunningAgent, tmp_path: Path) -> None:
    archive = tmp_path / "image.tar"
    images.write_archive(images.pause(), archive)
    before = descriptors(agent)
    with idle_clients(str(agent.root / "run/control.sock")) as clients:
        wait_for("the end of the oldest", lambda: is_closed(clients[0]))
        load = agent.command("image load", str(archive))
        done = subprocess.run(load, capture_output=True, text=True, timeout=60, check=False)
        assert "loaded" in done.stdout, done.stderr
        assert descriptors(agent) < before + 60
