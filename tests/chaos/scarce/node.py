"""A node with little left: containers that run and that end while something is scarce, and what is asked of it."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc

from nodeagent.api import runtime_pb2 as pb
from tests.e2e.conftest import client
from tests.support import images
from tests.support.cri import EXITED, RUNNING, Cri
from tests.support.node import RunningAgent, wait_for
from tests.support.registry import Registry

# They wait without a process of their own, which a node without processes could not give them.
_CLOCK = "mkfifo /clock; exec 3<>/clock; "
_PAUSE = "read -t 0.02 x <&3"
COUNT = f"{_CLOCK} i=0; while :; do echo $i; i=$((i+1)); {_PAUSE}; done"
_TERM = f"{_CLOCK} trap 'exit 5' TERM; echo set; while :; do {_PAUSE}; done"
_LEAVE = f"{_CLOCK} until [ -e /gate/go ]; do {_PAUSE}; done; echo last words; exit 7"
TIMEOUT_SECONDS = 40.0

# What says that something is scarce, or that it cannot be had now.
CLEAR = frozenset(
    (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.UNAVAILABLE,
    )
)


@dataclass(frozen=True, slots=True)
class Outcome:
    step: str
    code: grpc.StatusCode
    text: str

    def __str__(self) -> str:
        return f"{self.code.name}{': ' if self.text else ''}{self.text[:300]}"

    def complaint(self, names: tuple[str, ...]) -> str:
        """What is wrong with it, if anything is. names: words of which the text has one."""
        if self.code is grpc.StatusCode.OK:
            return ""
        # A pull's code is what the kubelet can read: see `nodeagent.cri.status`.
        pulled = self.step == "PullImage" and self.code is grpc.StatusCode.UNKNOWN
        if self.code not in CLEAR and not pulled:
            return f"{self.step}: {self}"
        if "rrno" in self.text or "internal error" in self.text:
            return f"{self.step}: the text is Python's: {self}"
        if not any(name in self.text for name in names):
            return f"{self.step}: does not say what is scarce: {self}"
        return ""


class Node:
    """main runs through; the others end in one way each."""

    def __init__(self, cri: Cri, another_image: str, gate: Path) -> None:
        self.cri = cri
        self.agent = cri.agent
        self._another_image = another_image
        self._gate = gate
        gate.mkdir()
        self.main = cri.run("sh", "-c", COUNT)
        self.parked = self.main.pod.container(name="parked")
        volume = pb.Mount(container_path="/gate", host_path=str(gate))
        self.leaving = cri.run("sh", "-c", _LEAVE, mounts=[volume])
        self.stopping = self.main.pod.run("sh", "-c", _TERM, name="stopping")
        self.stopping.said("set")
        self.other = cri.run()

    def outcomes(self) -> list[Outcome]:
        """Ask everything once, one after the other; what ends containers comes last."""
        runtime, main = self.agent.runtime, self.main.id
        pod = self.main.pod
        late = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name="late"),
            image=pb.ImageSpec(image=self.cri.image),
            command=["sleep", "1000"],
            log_path="late.log",
        )
        steps: dict[str, Callable[[], object]] = {
            "ListContainers": lambda: runtime.ListContainers(
                pb.ListContainersRequest(), timeout=TIMEOUT_SECONDS
            ),
            "Status": lambda: runtime.Status(pb.StatusRequest(), timeout=TIMEOUT_SECONDS),
            "ContainerStats": lambda: runtime.ContainerStats(
                pb.ContainerStatsRequest(container_id=main), timeout=TIMEOUT_SECONDS
            ),
            "ExecSync": lambda: self.main.exec("true", timeout=20),
            "RunPodSandbox": lambda: [self.cri.pod() for _ in range(3)],
            "CreateContainer": lambda: runtime.CreateContainer(
                pb.CreateContainerRequest(
                    pod_sandbox_id=pod.id, config=late, sandbox_config=pod.config
                ),
                timeout=TIMEOUT_SECONDS,
            ),
            "StartContainer": self.parked.start,
            "UpdateContainerResources": lambda: runtime.UpdateContainerResources(
                pb.UpdateContainerResourcesRequest(
                    container_id=main, linux=pb.LinuxContainerResources(cpu_shares=512)
                ),
                timeout=TIMEOUT_SECONDS,
            ),
            "ReopenContainerLog": lambda: runtime.ReopenContainerLog(
                pb.ReopenContainerLogRequest(container_id=main), timeout=TIMEOUT_SECONDS
            ),
            "PullImage": lambda: self.agent.images.PullImage(
                pb.PullImageRequest(image=pb.ImageSpec(image=self._another_image)),
                timeout=TIMEOUT_SECONDS,
            ),
            "StopContainer": lambda: self.stopping.stop(timeout=20),
            "RemoveContainer": self.stopping.remove,
            "StopPodSandbox": self.other.pod.stop,
            "RemovePodSandbox": self.other.pod.remove,
        }
        return [_outcome(step, call) for step, call in steps.items()]

    def leave(self) -> None:
        """Have a container end by itself."""
        (self._gate / "go").touch()

    def complaints(self, before: int) -> list[str]:
        """What must have gone on, or ended rightly. before: the number of lines that were logged when it began."""
        found = []
        if self.main.status.state != RUNNING:
            found.append(f"a container that ran was touched: {self.main.status}")
        self._after("the log does not go on", lambda: self.lines() > before, found)
        self._after("an end is not seen", lambda: self.leaving.status.state == EXITED, found)
        if self.leaving.status.exit_code != 7:
            found.append(f"an exit code is lost: {self.leaving.status.exit_code}, not 7")
        return found

    def _after(self, complaint: str, condition: Callable[[], bool], found: list[str]) -> None:
        try:
            wait_for(complaint, condition, 30)
        except AssertionError as error:
            found.append(str(error))

    def lines(self) -> int:
        return self.main.log.read_text().count("\n")

    def works_again(self) -> list[str]:
        """What fails now, without a restart, is wrong."""
        wrong: list[str] = []
        steps: dict[str, Callable[[], object]] = {
            "ExecSync": lambda: self.main.exec("true"),
            "a pod": self._run_a_pod,
            "PullImage": lambda: self.agent.images.PullImage(
                pb.PullImageRequest(image=pb.ImageSpec(image=self._another_image)), timeout=60
            ),
        }
        for step, call in steps.items():
            self._after(f"{step} works again", partial(_succeeds, call), wrong)
        return wrong

    def _run_a_pod(self) -> None:
        self.cri.run().pod.remove()

    def pids_hierarchy(self) -> Path:
        v1 = Path("/sys/fs/cgroup/pids")
        return v1 if v1.exists() else Path("/sys/fs/cgroup")

    def pids_group(self) -> Path:
        """The agent's own, with the launcher, the supervisors and the containers."""
        root = str(self.agent.root / "lib")
        return self.pids_hierarchy() / f"nodeagent-{hashlib.sha256(root.encode()).hexdigest()[:8]}"


def _outcome(step: str, call: Callable[[], object]) -> Outcome:
    try:
        call()
    except grpc.RpcError as error:
        return Outcome(step, error.code(), error.details() or "")
    return Outcome(step, grpc.StatusCode.OK, "")


@contextmanager
def node(agent: RunningAgent, registry: Registry) -> Iterator[Node]:
    """A started agent's node; at the end nothing may be left of it."""
    agent.trust(registry.host)
    agent.start()
    try:
        small = images.pause()
        another = f"{registry.host}/{small.repository}:{small.tags[0]}"
        yield Node(client(agent, registry), another, agent.root / "gate")
    finally:
        agent.remove_pods()
        code = agent.stop()
    assert code == 0, agent.log.read_text()[-4000:]


def _succeeds(call: Callable[[], object]) -> bool:
    """Whether it does now: addresses are free some moments after their pods, when the kernel has removed the links."""
    try:
        call()
    except grpc.RpcError:
        return False
    return True
