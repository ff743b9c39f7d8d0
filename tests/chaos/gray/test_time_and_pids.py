"""A clock that is set, and pids that come again. In a guest only: both belong to the whole machine."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import grpc
import pytest

from nodeagent.api import runtime_pb2 as pb
from tests.chaos.gray.faults import pid_of
from tests.e2e.conftest import own_agent, own_cri
from tests.support.cri import EXITED, RUNNING, Container, Cri, refused
from tests.support.node import wait_for

__all__ = ["own_agent", "own_cri"]

pytestmark = pytest.mark.skipif("NODEAGENT_GUEST" not in os.environ, reason="in a guest only")

HOUR = 3600.0
PATIENT = 60.0  # less than the clock is set by
PID_MAX = Path("/proc/sys/kernel/pid_max")


@contextmanager
def clock_set_by(seconds: float) -> Iterator[None]:
    began, now = time.monotonic(), time.time()
    time.clock_settime(time.CLOCK_REALTIME, now + seconds)
    try:
        yield
    finally:
        time.clock_settime(time.CLOCK_REALTIME, now + time.monotonic() - began)


@pytest.mark.parametrize("seconds", [HOUR, -HOUR])
def test_the_clock_is_set(own_cri: Cri, seconds: float) -> None:
    """Nothing takes longer, or ends earlier, and an agent that starts then finds all as it was."""
    stubborn = own_cri.run("sh", "-c", "trap '' TERM; echo set; while :; do sleep 0.05; done")
    stubborn.said("set")
    steady, ending = own_cri.run(), own_cri.run("sh", "-c", "sleep 3; exit 7")
    runtime = own_cri.agent.runtime
    stop = runtime.StopContainer.future(
        pb.StopContainerRequest(container_id=stubborn.id, timeout=3), timeout=PATIENT
    )
    command = runtime.ExecSync.future(
        pb.ExecSyncRequest(container_id=steady.id, cmd=["sleep", "1000"], timeout=3),
        timeout=PATIENT,
    )
    began = time.monotonic()
    with clock_set_by(seconds):
        stop.result()
        assert command.exception().code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert 2 < time.monotonic() - began < PATIENT
        assert ending.ended(PATIENT).exit_code == 7
        works(steady)
        own_cri.agent.restart()
        assert stubborn.status.exit_code == 137
        works(steady)
    works(steady)


def works(container: Container) -> None:
    assert container.status.state == RUNNING
    assert container.shell("echo works") == "works"
    request = pb.ContainerStatsRequest(container_id=container.id)
    stats = container.pod.cri.agent.runtime.ContainerStats(request, timeout=PATIENT).stats
    assert stats.cpu.usage_nano_cores.value < 64 * 10**9
    fresh = container.pod.cri.run("sh", "-c", "echo fresh")
    assert fresh.ended(PATIENT).exit_code == 0
    fresh.pod.remove()
    call = partial(container.exec, "sleep", "100", timeout=1)
    refused(grpc.StatusCode.DEADLINE_EXCEEDED, "ran longer than 1 s", call)


@pytest.fixture
def few_pids() -> Iterator[None]:
    before = PID_MAX.read_text()
    highest = max(int(name) for name in os.listdir("/proc") if name.isdigit())
    PID_MAX.write_text(str(max(highest + 200, 1000)))
    yield
    PID_MAX.write_text(before)


@contextmanager
def process_with(pid: int) -> Iterator[None]:
    """Another process with the pid of one that has died."""
    for _ in range(20_000):
        with subprocess.Popen(["sleep", "1000"]) as process:
            try:
                if process.pid == pid:
                    yield
                    return
            finally:
                process.kill()
    raise AssertionError(f"no process got the pid {pid}")


def is_alive(pid: int) -> bool:
    return "(sleep)" in Path(f"/proc/{pid}/stat").read_text()


@pytest.mark.usefixtures("few_pids")
def test_the_pid_of_a_supervisor_comes_again(own_cri: Cri) -> None:
    """Its successor is found, and who has its pid now is left alone."""
    container = own_cri.run()
    supervisor = container.pod.supervisor
    own_cri.agent.kill()
    os.kill(supervisor, signal.SIGKILL)
    wait_for("its end", lambda: not Path(f"/proc/{supervisor}").exists())
    with process_with(supervisor):
        own_cri.agent.start()
        assert container.shell("echo works") == "works"
        container.stop()
        container.pod.remove()
        assert is_alive(supervisor)


@pytest.mark.usefixtures("few_pids")
def test_the_pid_of_a_container_comes_again(own_cri: Cri) -> None:
    """After its end, and before anybody asks for it."""
    container = own_cri.run("sh", "-c", "sleep 1; exit 7")
    pid, supervisor = pid_of(container), container.pod.supervisor
    own_cri.agent.kill()
    wait_for("its end", lambda: not Path(f"/proc/{pid}").exists())
    with process_with(pid):
        os.kill(supervisor, signal.SIGKILL)
        own_cri.agent.start()
        assert (container.status.state, container.status.exit_code) == (EXITED, 7)
        container.pod.remove()
        assert is_alive(pid)
