"""Pipes whose lock is held: by a process in the middle of splice(2), for which all users of the pipe wait.

A container can have its supervisor wait so, and with that its pod; never the agent.
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import grpc
import pytest

from nodeagent.api import runtime_pb2 as pb
from tests.e2e.streams import Streams
from tests.security.agent.conftest import PullHostile
from tests.support import images, tars
from tests.support.cri import SLEEP, Container, Cri
from tests.support.node import wait_for

# A child moves what is in the pipe of stdout, or of stdin where that is asked for, to a socket that nobody reads, and
# waits for room in it; the first process goes on writing.
HOLD = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>
int main(int argc, char **argv)
{
	const char *pipe = argc > 1 ? "/proc/self/fd/0" : "/proc/self/fd/1";
	int pair[2], reader = open(pipe, O_RDONLY), writer = open(pipe, O_WRONLY);
	socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
	while (send(pair[0], pair, 1, MSG_DONTWAIT) == 1)
		;
	if (!fork())
		for (;;)
			splice(reader, NULL, pair[0], NULL, 4096, 0);
	for (;;) {
		write(writer, "x\n", 2);
		usleep(1000);
	}
}
"""


def is_stuck(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "D"


@pytest.fixture
def image(hostile: PullHostile) -> pb.ImageSpec:
    return hostile(tars.file("hold", images.compiled(HOLD), mode=0o755))


def holding(cri: Cri, image: pb.ImageSpec) -> tuple[Container, Container]:
    """A container that has its supervisor wait, and one beside it."""
    pod = cri.pod()
    supervisor = pod.supervisor
    other = pod.run(*SLEEP, name="other")
    container = pod.container("/hold", image=image)
    container.start()
    wait_for("a supervisor that waits", lambda: is_stuck(supervisor))
    return container, other


def test_a_container_that_holds_its_output_can_be_stopped(cri: Cri, image: pb.ImageSpec) -> None:
    container, other = holding(cri, image)
    container.stop(timeout=1)
    assert container.status.exit_code == 137
    assert other.exec("true").exit_code == 0
    other.pod.remove()


def test_a_pod_with_such_a_container_can_be_stopped(cri: Cri, image: pb.ImageSpec) -> None:
    container, _ = holding(cri, image)
    container.pod.stop()
    assert container.status.state == pb.CONTAINER_EXITED
    container.pod.remove()


# --- execs and attachments: the agent has descriptors of them ---

Attack = Callable[[Container], AbstractContextManager[object]]


@pytest.fixture
def crictl_streams(crictl: Path, cri: Cri) -> Streams:
    return Streams(crictl, cri, "websocket")


@contextmanager
def in_background(call: Callable[[], object]) -> Iterator[None]:
    """A call that ends with the container, and may fail then."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(call)
        yield
        assert future.exception() is None or isinstance(future.exception(), grpc.RpcError)


@contextmanager
def typing(streams: Streams, *command: str) -> Iterator[None]:
    """A client of crictl that goes on typing."""
    over = threading.Event()

    def go_on(keyboard: int) -> None:
        """Until the client has ended; nothing is left in a buffer then, to be written when that is closed."""
        with suppress(BrokenPipeError):
            while not over.wait(0.01):
                os.write(keyboard, b"x\n")

    with streams.running(*command) as client, ThreadPoolExecutor(1) as pool:
        assert client.stdin is not None
        pool.submit(go_on, client.stdin.fileno())
        try:
            yield
        finally:
            over.set()


def pipes(pid: int) -> int:
    """How many descriptors of pipes a process has."""
    folder = Path(f"/proc/{pid}/fd")
    return sum(link(path).startswith("pipe:") for path in folder.iterdir())


def link(path: Path) -> str:
    try:
        return os.readlink(path)
    except FileNotFoundError:
        return ""


def assert_only_its_pod_waits(container: Container, attack: Attack) -> None:
    """Somebody waits for the attack, and others notice nothing of it; nothing is left when it is over."""
    cri = container.pod.cri
    agent, supervisor = cri.agent.pid, container.pod.supervisor
    other = cri.run()
    before = pipes(agent)
    with attack(container):
        wait_for("the lock", lambda: is_stuck(supervisor) or is_stuck(agent))
        cri.agent.runtime.Version(pb.VersionRequest(), timeout=60)
        cri.agent.runtime.ListContainers(pb.ListContainersRequest(), timeout=60)
        assert other.exec("echo", "well", timeout=60).stdout == b"well\n"
        assert is_stuck(supervisor)
        container.stop()
    container.pod.remove()
    other.pod.remove()
    wait_for("no pipe of it", lambda: pipes(agent) <= before)


def test_exec_sync_holds_its_output(cri: Cri, image: pb.ImageSpec) -> None:
    def attack(container: Container) -> AbstractContextManager[None]:
        return in_background(lambda: container.exec("/hold", timeout=600))

    assert_only_its_pod_waits(cri.run(image=image), attack)


def test_the_end_of_an_exec_that_holds_its_output_frees_its_pod(
    cri: Cri, image: pb.ImageSpec
) -> None:
    """The supervisor cannot keep the time."""
    container = cri.run(image=image)
    with pytest.raises(grpc.RpcError) as caught:
        container.exec("/hold", timeout=1)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert container.exec("echo", "well").stdout == b"well\n"
    container.pod.remove()


@pytest.mark.parametrize("arguments", [(), ("stdin",)])
def test_a_streaming_exec_holds_a_pipe(
    cri: Cri, image: pb.ImageSpec, crictl_streams: Streams, arguments: tuple[str, ...]
) -> None:
    def attack(container: Container) -> AbstractContextManager[None]:
        return typing(crictl_streams, "exec", "-i", container.id, "/hold", *arguments)

    assert_only_its_pod_waits(cri.run(image=image), attack)


def test_an_attached_container_holds_its_input(
    cri: Cri, image: pb.ImageSpec, crictl_streams: Streams
) -> None:
    def attack(container: Container) -> AbstractContextManager[None]:
        return typing(crictl_streams, "attach", "-i", container.id)

    assert_only_its_pod_waits(cri.run("/hold", "stdin", image=image, stdin=True), attack)
