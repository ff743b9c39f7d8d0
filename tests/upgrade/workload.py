"""What runs on a node while its agent is replaced: pods that are looked at afterwards, and others that come and go."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from nodeagent.api import runtime_pb2 as pb
from nodeagent.api import runtime_pb2_grpc as rpc
from tests.support.cri import CREATED, EXITED, RUNNING, Container, Cri, pod_options, refused
from tests.support.node import PATIENCE_SECONDS, RunningAgent, wait_for

PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
COUNT = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.01; done"
CHURNING = "churn"
_CLIENTS = 2

# What a client sees whose call the end of an agent cuts off.
_CUT_OFF = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


class Workload:
    """Pods of one release. gate: a directory in which a file lets a container end."""

    def __init__(self, cri: Cri, gate: Path) -> None:
        self.gate = gate
        gate.mkdir(parents=True)
        self.counting = cri.run("sh", "-c", COUNT)
        self.ended = cri.run("sh", "-c", "echo over; exit 3")
        self.waiting = cri.pod().container("sh", "-c", "echo late; exit 4")
        self.leaving = cri.run(
            "sh",
            "-c",
            "until [ -e /gate/go ]; do sleep 0.02; done; echo last words; exit 7",
            mounts=[pb.Mount(container_path="/gate", host_path=str(gate))],
        )
        sharing = cri.pod(linux=pod_options(pid=pb.POD))
        self.sharing = [sharing.run(name="one"), sharing.run(name="two")]
        self.stopping = cri.run(
            "sh", "-c", "trap 'exit 5' TERM; echo set; while :; do sleep 0.05; done"
        )
        self.stopping.said("set")
        self.ended.ended()
        self.counting.said("10")
        self._addresses = {item.pod.id: item.pod.ip for item in self.all}

    @property
    def all(self) -> list[Container]:
        alone = [self.counting, self.ended, self.waiting, self.leaving, self.stopping]
        return [*alone, *self.sharing]

    def leave(self) -> None:
        """Have the container end that waits for it, and return when it has; no agent has to be there."""
        pid = self._pid_of_leaving()
        (self.gate / "go").touch()
        wait_for("the end of a container", lambda: not Path(f"/proc/{pid}").exists())

    def _pid_of_leaving(self) -> int:
        for entry in os.listdir("/proc"):
            try:
                mounts = Path(f"/proc/{entry}/mountinfo").read_text() if entry.isdigit() else ""
                if f" {self.gate} /gate " in mounts or f"{self.gate} /gate " in mounts:
                    return int(entry)
            except OSError:
                continue
        raise LookupError(self.gate)

    def check(self, *, shows_plans: bool = True) -> None:
        """All is as it was, and can be used. shows_plans: the agent has the plans of these containers."""
        runtime = self.counting.pod.cri.agent.runtime
        pods = runtime.ListPodSandbox(pb.ListPodSandboxRequest()).items
        ready = {pod.id for pod in pods if pod.state == pb.SANDBOX_READY}
        assert ready >= self._addresses.keys()
        listed = runtime.ListContainers(pb.ListContainersRequest()).containers
        states = {item.id: item.state for item in listed}
        assert [states[item.id] for item in self.all] == [item.status.state for item in self.all]
        assert {item.pod.id: item.pod.ip for item in self.all} == self._addresses
        for item in self.all:
            shown = inspected(item)
            assert shown["sandboxID"] == item.pod.id
            if shows_plans:
                assert shown["plan"]["argv"] == list(item.config.command)
        for item in (self.counting, *self.sharing):
            assert (item.status.state, item.shell("echo works")) == (RUNNING, "works")
        assert {
            process for process in self.sharing[0].shell("ps").splitlines() if "sleep" in process
        }
        assert (self.ended.status.exit_code, self.ended.output) == (3, "over")
        assert (self.leaving.ended().exit_code, self.leaving.output) == (7, "last words")
        self.nothing_is_lost()

    def nothing_is_lost(self) -> None:
        """The log goes on, and has no gap; the kubelet rotates it."""
        before = len(self.counted())
        wait_for("more lines", lambda: len(self.counted()) > before + 5)
        self.counting.log.rename(f"{self.counting.log}.{before}")
        request = pb.ReopenContainerLogRequest(container_id=self.counting.id)
        self.counting.pod.cri.agent.runtime.ReopenContainerLog(request)
        wait_for("the next log", self.counting.log.exists)
        self._has_no_gap()

    def _has_no_gap(self) -> None:
        numbers = self.counted()
        assert numbers == list(range(len(numbers)))

    def counted(self) -> list[int]:
        log = self.counting.log
        rotated = [path for path in log.parent.iterdir() if path.name.startswith(f"{log.name}.")]
        rotated.sort(key=lambda path: int(path.name.rpartition(".")[2]))
        lines = [line for path in (*rotated, log) if path.exists() for line in _whole(path)]
        return [int(line.split(" ", 3)[3]) for line in lines]

    def finish(self, another: str = "") -> None:
        """Start what was not started, stop what was not stopped; the numbers are those of the programs.

        another: how one more container in a shared PID namespace is refused; "" if it is not.
        """
        assert self.waiting.status.state == CREATED
        self.waiting.start()
        assert (self.waiting.ended().exit_code, self.waiting.output) == (4, "late")
        self.stopping.stop(timeout=60)
        assert (self.stopping.status.state, self.stopping.status.exit_code) == (EXITED, 5)
        self.sharing[1].remove()
        sharing = self.sharing[0].pod
        if another:
            refused(PRECONDITION, another, lambda: sharing.container(name="three"))
        else:
            assert sharing.run(name="three").shell("echo works") == "works"
        self.counting.stop()
        assert self.counting.status.exit_code == 137
        self._has_no_gap()
        for item in self.all:
            item.pod.stop()
            item.remove()
            item.pod.remove()


def _whole(path: Path) -> list[str]:
    """A line that is being written is not among them."""
    return path.read_text().rpartition("\n")[0].splitlines()


def inspected(container: Container) -> dict[str, Any]:
    request = pb.ContainerStatusRequest(container_id=container.id, verbose=True)
    answer = container.pod.cri.agent.runtime.ContainerStatus(request, timeout=PATIENCE_SECONDS)
    shown: dict[str, Any] = json.loads(answer.info["info"])
    return shown


class Churn:
    """Pods that are made, used and removed all the time, by several clients. rounds: of pods that came and went."""

    def __init__(self, endpoint: str, image: str, number: int) -> None:
        self._endpoint = endpoint
        self._image = image
        self._over = threading.Event()
        self.rounds = 0
        self.failures: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(number)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _run(self, client: int) -> None:
        number = 0
        while not self._over.is_set():
            number += 1
            try:
                with grpc.insecure_channel(self._endpoint) as channel:
                    self._round(rpc.RuntimeServiceStub(channel), f"{CHURNING}-{client}-{number}")
                self.rounds += 1
            except grpc.RpcError as error:
                if error.code() not in _CUT_OFF:
                    self.failures.append(f"{error.code()}: {error.details()}")
            except AssertionError as error:
                self.failures.append(repr(error))

    def _round(self, runtime: rpc.RuntimeServiceStub, name: str) -> None:
        patience = {"timeout": PATIENCE_SECONDS, "wait_for_ready": True}
        sandbox = pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=name, uid=f"{name}-{id(self)}", namespace=CHURNING)
        )
        pod = runtime.RunPodSandbox(pb.RunPodSandboxRequest(config=sandbox), **patience)
        pod_id = pod.pod_sandbox_id
        container = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name="main"),
            image=pb.ImageSpec(image=self._image),
            command=["sleep", "1000"],
        )
        request = pb.CreateContainerRequest(
            pod_sandbox_id=pod_id, config=container, sandbox_config=sandbox
        )
        container_id = runtime.CreateContainer(request, **patience).container_id
        runtime.StartContainer(pb.StartContainerRequest(container_id=container_id), **patience)
        command = pb.ExecSyncRequest(container_id=container_id, cmd=["echo", name], timeout=60)
        assert runtime.ExecSync(command, **patience).stdout.decode().strip() == name
        runtime.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod_id), **patience)
        runtime.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod_id), **patience)


@contextmanager
def churning(cri: Cri, endpoint: str) -> Iterator[Churn]:
    """While this lasts; some rounds are over before, and after what is done meanwhile. What was cut off is removed.

    endpoint: one that all releases serve.
    """
    churn = Churn(endpoint, cri.image, _CLIENTS)
    churn.start()
    try:
        wait_for("pods that come and go", lambda: churn.rounds > 2 or bool(churn.failures))
        yield churn
        before = churn.rounds
        wait_for("more of them", lambda: churn.rounds > before + 2 or bool(churn.failures))
    finally:
        churn.stop()
    assert not churn.failures, churn.failures
    _remove_churned(cri.agent)


def _remove_churned(agent: RunningAgent) -> None:
    for pod in agent.runtime.ListPodSandbox(pb.ListPodSandboxRequest()).items:
        if pod.metadata.namespace == CHURNING:
            agent.runtime.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod.id))
