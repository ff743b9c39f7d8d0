"""A supervisor that a container holds up, and what goes on or ends all the same: stops, the agent's start and end."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nodeagent.api import runtime_pb2 as pb
from tests.e2e.conftest import own_agent, own_cri
from tests.kernel.sandbox.supervised import waits_in_splice
from tests.security.agent.conftest import pull_hostile
from tests.security.agent.test_held_pipes import HOLD, is_stuck
from tests.support import images, tars
from tests.support.cri import SLEEP, Container, Cri, options, pod_options
from tests.support.node import wait_for
from tests.support.registry import Registry

__all__ = ["own_agent", "own_cri"]

# Holds a pipe of another container, which it has open before that one ends, once that one has ended.
HOLD_ANOTHERS = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>
int main(int argc, char **argv)
{
	char path[64];
	int pair[2];
	snprintf(path, sizeof path, "/proc/%s/fd/1", argv[1]);
	int reader = open(path, O_RDONLY), writer = open(path, O_WRONLY);
	if (reader < 0 || writer < 0)
		return 1;
	puts("up");
	fflush(stdout);
	while (!kill(atoi(argv[1]), 0))
		usleep(1000);
	socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
	while (send(pair[0], pair, 1, MSG_DONTWAIT) == 1)
		;
	write(writer, "x\n", 2);
	for (;;)
		splice(reader, NULL, pair[0], NULL, 4096, 0);
}
"""


@contextmanager
def creating(container: Container) -> Iterator[None]:
    """A creation beside the container, which its supervisor does not answer."""
    pod = container.pod
    directories = pod.cri.agent.root / "lib" / "containers"
    before = set(os.listdir(directories))
    config = pb.ContainerConfig(
        metadata=pb.ContainerMetadata(name="late"),
        image=pb.ImageSpec(image=pod.cri.image),
        command=SLEEP,
    )
    request = pb.CreateContainerRequest(
        pod_sandbox_id=pod.id, config=config, sandbox_config=pod.config
    )
    call = pod.cri.agent.runtime.CreateContainer.future(request, timeout=600)
    wait_for("the creation", lambda: set(os.listdir(directories)) > before)
    try:
        yield
    finally:
        call.cancel()


def holding(cri: Cri, registry: Registry) -> Container:
    image = pull_hostile(cri, registry, tars.file("hold", images.compiled(HOLD), mode=0o755))
    pod = cri.pod()
    supervisor = pod.supervisor
    container = pod.container("/hold", image=image)
    container.start()
    wait_for("a supervisor that waits", lambda: is_stuck(supervisor))
    return container


def test_a_pod_is_stopped_while_a_creation_in_it_is_held_up(cri: Cri, registry: Registry) -> None:
    container = holding(cri, registry)
    with creating(container):
        container.pod.stop()
    container.pod.remove()


def test_an_agent_starts_beside_a_supervisor_that_is_held_up(
    own_cri: Cri, registry: Registry
) -> None:
    container = holding(own_cri, registry)
    own_cri.agent.restart()
    container.pod.remove()


def test_an_agent_starts_after_a_creation_that_was_held_up(
    own_cri: Cri, registry: Registry
) -> None:
    container = holding(own_cri, registry)
    with creating(container):
        own_cri.agent.restart()
    container.pod.remove()


def test_an_agent_ends_while_a_creation_is_held_up(own_cri: Cri, registry: Registry) -> None:
    container = holding(own_cri, registry)
    with creating(container):
        assert own_cri.agent.stop() == 0  # the undo is left to the next one
    own_cri.agent.start()
    container.pod.remove()


def test_an_agent_starts_beside_a_successor_that_is_held_up(
    own_cri: Cri, registry: Registry
) -> None:
    """By another container of the pod, which holds the pipe of one that ended while there was no supervisor."""
    image = pull_hostile(
        own_cri, registry, tars.file("hold", images.compiled(HOLD_ANOTHERS), mode=0o755)
    )
    pod = own_cri.pod(linux=pod_options(pid=pb.POD))
    shared = options(namespace_options=pb.NamespaceOption(pid=pb.POD))
    victim = pod.run("sh", "-c", "echo $$; exec sleep 1000", name="victim", linux=shared)
    wait_for("its pid", lambda: victim.log.exists() and victim.output != "")
    holder = pod.run("/hold", victim.output, name="holder", image=image, linux=shared)
    holder.said("up")
    pids = {container.id: pid_of(container) for container in (victim, holder)}
    supervisor = pod.supervisor
    own_cri.agent.kill()
    os.kill(supervisor, signal.SIGKILL)
    wait_for("its end", lambda: not Path(f"/proc/{supervisor}").exists())
    os.kill(pids[victim.id], signal.SIGKILL)
    wait_for("the lock", lambda: waits_in_splice(f"/proc/{pids[holder.id]}"))
    own_cri.agent.start()
    pod.remove()


def pid_of(container: Container) -> int:
    """The pid of its first process on the node."""
    request = pb.ContainerStatusRequest(container_id=container.id, verbose=True)
    answer = container.pod.cri.agent.runtime.ContainerStatus(request, timeout=60)
    return int(json.loads(answer.info["info"])["pid"])
