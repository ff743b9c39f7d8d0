"""Who waits in the middle of splice(2) holds the pipe's lock, and whoever reads it waits as well, uninterruptibly."""

from pathlib import Path

from nodeagent.api import runtime_pb2 as pb
from tests import images, tars
from tests.cri import SLEEP, Container, Cri
from tests.node import wait_for
from tests.security.agent.conftest import PullHostile

# A child moves output to a socket that nobody reads, and waits for room in it; the first process goes on writing.
HOLD = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>
int main(void)
{
	int pair[2], reader = open("/proc/self/fd/1", O_RDONLY);
	socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
	while (send(pair[0], pair, 1, MSG_DONTWAIT) == 1)
		;
	if (!fork())
		for (;;)
			splice(reader, NULL, pair[0], NULL, 4096, 0);
	for (;;) {
		write(1, "x\n", 2);
		usleep(1000);
	}
}
"""


def is_stuck(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "D"


def holding(cri: Cri, hostile: PullHostile) -> tuple[Container, Container]:
    """A container that has its supervisor wait, and one beside it."""
    image = hostile(tars.file("hold", images.compiled(HOLD), mode=0o755))
    pod = cri.pod()
    supervisor = pod.supervisor
    other = pod.run(*SLEEP, name="other")
    container = pod.container("/hold", image=image)
    container.start()
    wait_for("a supervisor that waits", lambda: is_stuck(supervisor), 30)
    return container, other


def test_a_container_that_holds_its_output_can_be_stopped(cri: Cri, hostile: PullHostile) -> None:
    container, other = holding(cri, hostile)
    container.stop(timeout=1)
    assert container.status.exit_code == 137
    assert other.exec("true").exit_code == 0
    other.pod.remove()


def test_a_pod_with_such_a_container_can_be_stopped(cri: Cri, hostile: PullHostile) -> None:
    container, _ = holding(cri, hostile)
    container.pod.stop()
    assert container.status.state == pb.CONTAINER_EXITED
    container.pod.remove()
