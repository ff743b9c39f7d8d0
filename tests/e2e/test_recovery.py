"""The agent dies; nothing else does."""

import functools
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import pytest

from nodeagent.api import runtime_pb2 as pb
from tests.support.cri import EXITED, RUNNING, Cri, Pod
from tests.support.node import PATIENCE_SECONDS, RunningAgent, wait_for


def test_containers_never_notice(own_agent: RunningAgent, own_cri: Cri) -> None:
    script = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.01; done"
    container = own_cri.run("sh", "-c", script, labels={"a": "b"})
    pod, pid = container.pod, container.exec("sh", "-c", "echo $PPID").stdout
    before, ip = container.status, pod.ip
    own_agent.restart()
    after = container.status
    assert (after.state, after.started_at) == (RUNNING, before.started_at)
    assert dict(after.labels) == {"a": "b"}
    assert pod.status.state == pb.SANDBOX_READY
    assert pod.ip == ip
    assert container.exec("sh", "-c", "echo $PPID").stdout == pid
    container.stop()
    numbers = [int(line) for line in container.output.splitlines()]
    assert numbers == list(range(len(numbers)))


def test_exit_code_while_no_agent_runs(own_agent: RunningAgent, own_cri: Cri) -> None:
    container = own_cri.run("sh", "-c", "sleep 0.5; echo last words; exit 42")
    own_agent.kill()
    time.sleep(1)
    own_agent.start()
    status = container.status
    assert (status.state, status.exit_code, status.reason) == (EXITED, 42, "Error")
    assert container.output == "last words"


def test_an_orderly_stop_leaves_pods_running(own_agent: RunningAgent, own_cri: Cri) -> None:
    container = own_cri.run()
    assert own_agent.stop() == 0
    own_agent.start()
    assert container.status.state == RUNNING
    assert container.shell("echo works") == "works"


def test_kill_deadline_outlives_the_agent(own_agent: RunningAgent, own_cri: Cri) -> None:
    container = own_cri.run("sh", "-c", "trap '' TERM; echo set; while :; do sleep 0.05; done")
    container.said("set")
    request = pb.StopContainerRequest(container_id=container.id, timeout=1)
    call = own_agent.runtime.StopContainer.future(request)
    time.sleep(0.2)
    own_agent.kill()
    call.cancel()
    time.sleep(1.5)
    own_agent.start()
    assert container.status.state == EXITED
    assert container.status.exit_code == 137


def test_a_killed_supervisor_is_succeeded(own_cri: Cri) -> None:
    script = "i=0; while [ $i -lt 300 ]; do echo $i; i=$((i+1)); sleep 0.01; done; exit 6"
    container = own_cri.run("sh", "-c", script)
    os.kill(container.pod.supervisor, signal.SIGKILL)
    status = container.ended()
    assert (status.exit_code, status.reason) == (6, "Error")
    assert container.output.splitlines() == [str(n) for n in range(300)]


def test_nothing_is_left_without_pods(own_agent: RunningAgent, own_cri: Cri) -> None:
    own_cri.run().pod.remove()
    root = str(own_agent.root)
    assert own_agent.stop() == 0
    wait_for("no process", lambda: not processes_below(root))
    assert root not in Path("/proc/self/mounts").read_text()
    own_agent.start()


def processes_below(root: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if root.encode() in (entry / "cmdline").read_bytes():
                    found.append(entry.name)
            except OSError:
                continue
    return found


def test_a_killed_launcher_is_replaced(own_agent: RunningAgent, own_cri: Cri) -> None:
    container = own_cri.run(
        "sh", "-c", "trap 'exit 5' TERM; echo set; while :; do sleep 0.05; done"
    )
    container.said("set")
    os.kill(launcher_of(own_agent), signal.SIGKILL)
    assert container.shell("echo works") == "works"
    others = [own_cri.run() for _ in range(6)]  # more than there are warm slots
    assert all(other.status.state == RUNNING for other in others)
    own_agent.restart()
    container.stop(timeout=10)
    assert container.status.exit_code == 5


def test_a_launcher_is_replaced_before_it_is_needed(own_agent: RunningAgent) -> None:
    killed = launcher_of(own_agent)
    os.kill(killed, signal.SIGKILL)

    def is_replaced() -> bool:
        with suppress(LookupError):
            return launcher_of(own_agent) != killed
        return False

    wait_for("another launcher", is_replaced)


def launcher_of(agent: RunningAgent) -> int:
    for pid in processes_titled(f"nodeagent.sandbox.launcher {agent.root}/run"):
        return pid
    raise LookupError(agent.root)


def processes_titled(title: str) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                if (entry / "cmdline").read_bytes().startswith(title.encode()):
                    yield int(entry.name)


def test_a_pod_whose_supervisor_dies_is_stopped_all_the_same(own_cri: Cri) -> None:
    for _ in range(5):
        container = own_cri.run()
        pod = container.pod
        os.kill(pod.supervisor, signal.SIGKILL)
        wait_for("the pod's stop", functools.partial(succeeds, pod.stop))
        assert (container.status.state, container.status.exit_code) == (EXITED, 137)
        pod.remove()


def test_a_supervisor_that_dies_with_its_launcher_is_succeeded(
    own_agent: RunningAgent, own_cri: Cri
) -> None:
    container = own_cri.run(
        "sh", "-c", "trap 'exit 5' TERM; echo set; while :; do sleep 0.05; done"
    )
    container.said("set")
    supervisor = container.pod.supervisor
    os.kill(launcher_of(own_agent), signal.SIGKILL)
    os.kill(supervisor, signal.SIGKILL)
    wait_for("a successor", lambda: succeeds(lambda: container.shell("echo works")))
    container.stop(timeout=10)
    assert container.status.state == EXITED


def succeeds(call: Callable[[], object]) -> bool:
    """False where the agent says that another attempt may succeed."""
    try:
        call()
    except grpc.RpcError as error:
        if error.code() != grpc.StatusCode.UNAVAILABLE:
            raise
        return False
    return True


def test_a_request_that_does_not_end_does_not_keep_the_agent(
    own_agent: RunningAgent, own_cri: Cri
) -> None:
    """Its supervisor does not answer, neither when it is to make the container nor when it is to undo that.

    What could not be undone keeps its record, and is undone at the next start.
    """
    container = own_cri.run()
    pod, before = container.pod, directories(own_agent)
    pod_supervisor = pod.supervisor
    with stopped(pod_supervisor):
        call = own_agent.runtime.CreateContainer.future(creation(pod, "late"))
        wait_for("the container's directory", lambda: directories(own_agent) > before)
        [late] = directories(own_agent) - before
        assert own_agent.stop() == 0
        call.cancel()
    log = own_agent.log.read_text()
    assert "stopping: SIGTERM" in log
    assert (
        f'supervisor of pod "{pod.id}": process {pod_supervisor} does not answer: it is stopped'
        in log
    )
    own_agent.start()
    wait_for("the end of what was cut off", lambda: late not in directories(own_agent))
    assert container.shell("echo works") == "works"
    assert pod.run(name="late").shell("echo works") == "works"
    assert own_agent.stop() == 0
    assert own_agent.log.read_text().endswith("stopped\n")
    own_agent.start()


def test_a_supervisor_that_does_not_answer_holds_up_neither_the_start_nor_other_pods(
    own_agent: RunningAgent, own_cri: Cri
) -> None:
    """That of a pod in which a container is being made, and those of pods that nobody has asked for yet."""
    other, container = own_cri.run(), own_cri.run()
    pod, before = container.pod, directories(own_agent)
    with stopped(pod.supervisor, *warm_slots(own_agent)):
        call = own_agent.runtime.CreateContainer.future(creation(pod, "late"))
        wait_for("the container's directory", lambda: directories(own_agent) > before)
        [late] = directories(own_agent) - before
        own_agent.kill()
        call.cancel()
        own_agent.start()
        assert other.shell("echo works") == "works"
        assert own_cri.run().shell("echo works") == "works"
        assert container.status.state == RUNNING
    assert container.shell("echo works") == "works"
    wait_for("the end of what was cut off", lambda: late not in directories(own_agent))
    assert pod.run(name="late").shell("echo works") == "works"
    container.stop()
    assert container.status.state == EXITED


@pytest.mark.parametrize("state", ["taking over 3 pods", "serving"])
def test_sigterm_ends_an_agent_that_recovers(
    own_agent: RunningAgent,
    own_cri: Cri,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: str,
) -> None:
    """Beside a supervisor that does not answer, before the agent serves and afterwards; the next one goes on.

    In the silent pod a creation is to be undone, in another one a container has ended meanwhile.
    """
    silent, other = own_cri.run(), own_cri.run()
    ending = own_cri.run("sh", "-c", "while ! [ -e /end ]; do sleep 0.05; done; exit 7")
    ending.shell("(sleep 1; touch /end) >&- 2>&- <&- &")
    pod, before = silent.pod, directories(own_agent)
    with stopped(pod.supervisor):
        call = own_agent.runtime.CreateContainer.future(creation(pod, "late"))
        wait_for("the container's directory", lambda: directories(own_agent) > before)
        [late] = directories(own_agent) - before
        own_agent.kill()
        call.cancel()
        with status_told(tmp_path / "notify", monkeypatch) as told:
            own_agent.launch()
            told(f"STATUS={state}")
        began = time.monotonic()
        assert own_agent.stop() == 0
        assert time.monotonic() - began < 60
        assert own_agent.log.read_text().endswith("stopped\n")
        own_agent.start()
        assert own_cri.run().shell("echo works") == "works"
        assert [c.status.state for c in (silent, other)] == [RUNNING, RUNNING]
        assert other.shell("echo works") == "works"
        assert ending.ended().exit_code == 7
    wait_for("the end of what was cut off", lambda: late not in directories(own_agent))
    assert silent.shell("echo works") == "works"
    assert pod.run(name="late").shell("echo works") == "works"


@contextmanager
def status_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """What agents that are launched meanwhile tell their service manager; gives a function that waits for a text."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(PATIENCE_SECONDS)

        def wait(text: str) -> None:
            while text not in manager.recv(4096).decode():
                pass

        with monkeypatch.context() as context:
            context.setenv("NOTIFY_SOCKET", str(path))
            yield wait


def test_what_cannot_be_removed_at_the_start_is_tried_again(
    own_agent: RunningAgent, own_cri: Cri
) -> None:
    """A directory that somebody has mounted cannot be moved away."""
    pod, before = own_cri.pod(), directories(own_agent)
    with stopped(pod.supervisor):
        call = own_agent.runtime.CreateContainer.future(creation(pod, "late"))
        wait_for("the container's directory", lambda: directories(own_agent) > before)
        own_agent.kill()
        call.cancel()
    [late] = directories(own_agent) - before
    path = own_agent.root / "lib" / "containers" / late
    subprocess.run(["mount", "--bind", path, path], check=True)
    try:
        own_agent.start()
        assert own_cri.run().shell("echo works") == "works"
        assert late in directories(own_agent)
    finally:
        subprocess.run(["umount", path], check=True)
    wait_for("the end of what was cut off", lambda: late not in directories(own_agent))
    assert pod.run(name="late").shell("echo works") == "works"


def warm_slots(agent: RunningAgent) -> list[int]:
    """Supervisors of pods that nobody has asked for yet; there is one at least."""
    pods = {pod.id for pod in agent.runtime.ListPodSandbox(pb.ListPodSandboxRequest()).items}
    found: list[int] = []

    def look() -> bool:
        served = {path.parent.name for path in (agent.root / "run/pods").glob("*/supervisor.sock")}
        for pod_id in served - pods:
            found.extend(processes_titled(f"nodeagent.sandbox.supervisor {pod_id}"))
        return bool(found)

    wait_for("a warm slot", look)
    return found


def directories(agent: RunningAgent) -> set[str]:
    return set(os.listdir(agent.root / "lib" / "containers"))


def creation(pod: Pod, name: str) -> pb.CreateContainerRequest:
    config = pb.ContainerConfig(
        metadata=pb.ContainerMetadata(name=name), image=pb.ImageSpec(image=pod.cri.image)
    )
    return pb.CreateContainerRequest(
        pod_sandbox_id=pod.id, config=config, sandbox_config=pod.config
    )


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """Processes that do nothing meanwhile, nor die of anything but SIGKILL: the agent may kill those of warm slots."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def test_the_service_manager_hears_of_the_start_and_of_a_loop_that_turns(
    own_agent: RunningAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_agent.stop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE_SECONDS)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "100000")
        heard: list[str] = []
        reading = threading.Thread(target=collect, args=(manager, heard))
        reading.start()
        own_agent.start()
        reading.join(PATIENCE_SECONDS)
    assert "STATUS=taking over 0 pods" in heard[: heard.index("READY=1")]


def collect(manager: socket.socket, heard: list[str]) -> None:
    """What is told, up to the first sign of life after the start."""
    while "READY=1" not in heard or "WATCHDOG=1" not in heard[heard.index("READY=1") :]:
        heard += manager.recv(4096).decode().split("\n")
