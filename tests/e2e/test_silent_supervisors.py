"""Supervisors and the launcher that stand still, or whose connection ends: the pod's trouble, and nobody else's."""

import json
import os
import resource
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import grpc
import pytest

from nodeagent.api import runtime_pb2 as pb
from tests.e2e.test_recovery import launcher_of, stopped
from tests.support.cri import EXITED, RUNNING, Cri, Pod
from tests.support.node import RunningAgent, wait_for

PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def test_a_stopped_supervisor_is_its_pods_trouble_alone(
    own_agent: RunningAgent, own_cri: Cri
) -> None:
    """The agent starts beside it, lists the pod as its records have it, and says what is wrong and what helps."""
    pid, other = (silent := own_cri.run()).pod.supervisor, own_cri.run()
    with stopped(pid):
        own_agent.restart()
        assert silent.status.state == RUNNING
        assert silent.pod.status.state == pb.SANDBOX_READY
        assert other.shell("echo works") == "works"
        assert own_cri.run().shell("echo works") == "works"
        wait_for("the mark", lambda: not_answering(own_agent) == [silent.pod.id])
        why = json.loads(pod_info(silent.pod))["notAnswering"]
        assert why == (
            f'process {pid} does not answer: it is stopped (state T); resume it with "kill -CONT {pid}"'
        )
        assert metric(own_agent, "nodeagent_pods_not_answering") == 1
        with pytest.raises(grpc.RpcError, match="resume it with") as raised:
            silent.shell("true")
        assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    wait_for("the end of the mark", lambda: not_answering(own_agent) == [])
    assert json.loads(pod_info(silent.pod))["notAnswering"] == ""
    assert silent.shell("echo works") == "works"


def test_a_pod_whose_supervisor_stands_still_is_stopped_and_removed(
    own_agent: RunningAgent, own_cri: Cri
) -> None:
    """Also one that the agent has not reached since it started."""
    for restart in (False, True):
        container = own_cri.run()
        pod = container.pod
        with stopped_until_killed(pod.supervisor):
            if restart:
                own_agent.restart()
            succeeds(pod.stop)
            assert container.status.state == EXITED
            pod.remove()
    assert "it is killed, as its pod ends" in own_agent.log.read_text()


def test_a_stopped_launcher_is_replaced_at_the_start_and_later(
    own_agent: RunningAgent, own_cri: Cri
) -> None:
    container = own_cri.run()
    for restart in (True, False):
        launcher = launcher_of(own_agent)
        with stopped_until_killed(launcher):
            if restart:
                own_agent.restart()
            assert container.shell("echo works") == "works"
            wait_for("another launcher", partial(is_replaced, own_agent, own_cri, launcher))
        own_cri.pod()


@pytest.mark.parametrize("who", ["agent", "supervisor"])
def test_a_shortage_of_descriptors_passes(own_agent: RunningAgent, own_cri: Cri, who: str) -> None:
    """Containers that end meanwhile have their codes, and everything goes on without a restart."""
    containers = [
        own_cri.run("sh", "-c", "while ! [ -e /end ]; do sleep 0.05; done; exit 7")
        for _ in range(2)
    ]
    for container in containers:
        container.shell("(sleep 0.7; touch /end) >&- 2>&- <&- &")
    pids = [own_agent.pid] if who == "agent" else [c.pod.supervisor for c in containers]
    with without_descriptors(*pids):
        end = time.monotonic() + 2
        while time.monotonic() < end:
            for container in containers:
                with suppress(grpc.RpcError):
                    container.shell("true")
    for container in containers:
        assert container.ended().exit_code == 7
        again = container.pod.run(name="again")
        assert again.shell("echo works") == "works"
        container.pod.stop()
        container.pod.remove()


@contextmanager
def stopped_until_killed(pid: int) -> Iterator[None]:
    """A process that stands still until the agent kills it, or else until the end."""
    with suppress(ProcessLookupError), stopped(pid):
        yield


def is_replaced(agent: RunningAgent, cri: Cri, launcher: int) -> bool:
    """Use up a warm slot, and look who has made the next."""
    try:
        cri.pod()
    except grpc.RpcError as error:
        if error.code() not in PASSING:
            raise
    with suppress(LookupError):
        return launcher_of(agent) != launcher
    return False


@contextmanager
def without_descriptors(*pids: int) -> Iterator[None]:
    """Processes that can open no file more than they have."""
    limits = {pid: resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in pids}
    for pid in pids:
        highest = max(int(name) for name in os.listdir(f"/proc/{pid}/fd"))
        used = len(os.listdir(f"/proc/{pid}/fd"))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(used, highest + 1), limits[pid][1]))
    try:
        yield
    finally:
        for pid, limit in limits.items():
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)


def succeeds(call: Callable[[], object]) -> None:
    """The kubelet calls again after an error that says so."""

    def attempt() -> bool:
        try:
            call()
        except grpc.RpcError as error:
            if error.code() not in PASSING:
                raise
            return False
        return True

    wait_for("success", attempt)


def not_answering(agent: RunningAgent) -> list[str]:
    info = agent.runtime.Status(pb.StatusRequest(verbose=True)).info
    return list(json.loads(info["podsNotAnswering"]))


def pod_info(pod: Pod) -> str:
    request = pb.PodSandboxStatusRequest(pod_sandbox_id=pod.id, verbose=True)
    return str(pod.cri.agent.runtime.PodSandboxStatus(request).info["info"])


def metric(agent: RunningAgent, name: str) -> float:
    with urllib.request.urlopen(f"http://{agent.metrics}/metrics") as reply:
        for line in reply.read().decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[1])
    raise LookupError(name)
