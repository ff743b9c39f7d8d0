"""A node with a pod that is to suffer, and neighbours that must not notice: what their calls take, and say."""

import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from nodeagent.api import runtime_pb2 as pb
from nodeagent.api import runtime_pb2_grpc as rpc
from tests.e2e.conftest import client
from tests.support import images
from tests.support.cri import Container, Cri, Pod
from tests.support.node import PATIENCE_SECONDS, RunningAgent
from tests.support.registry import Registry

LONGEST_SECONDS = 15.0  # of a neighbour's call, on a machine however busy

# Codes that say whose trouble it is. INTERNAL and UNKNOWN are what a defect looks like.
CLEAR = frozenset(
    (
        grpc.StatusCode.OK,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.NOT_FOUND,
    )
)


@dataclass(slots=True)
class Times:
    """Seconds by call."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @contextmanager
    def of(self, call: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[call].append(time.perf_counter() - began)

    def median(self, call: str) -> float:
        return statistics.median(self.seconds[call])

    @property
    def longest(self) -> float:
        return max(max(values) for values in self.seconds.values())

    @property
    def slowest(self) -> str:
        """The call that took the longest."""
        return max(self.seconds, key=lambda call: max(self.seconds[call]))


@dataclass(slots=True)
class Outcome:
    """What a call on the suffering pod came to. code: None where it had no answer while the fault lasted."""

    step: str
    code: grpc.StatusCode | None
    text: str
    seconds: float

    @property
    def is_clear(self) -> bool:
        # A pull's code is what the kubelet can read: see `nodeagent.cri.status`.
        pulled = self.step == "PullImage" and self.code is grpc.StatusCode.UNKNOWN
        is_said = self.code is grpc.StatusCode.OK or bool(self.text.strip())
        return is_said and (pulled or self.code in CLEAR)

    def __str__(self) -> str:
        name = self.code.name if self.code else "waits"
        return f"{name} after {self.seconds:.1f} s{': ' if self.text else ''}{self.text[:160]}"


class World:
    """The neighbours run from the start; a suffering pod is made by each fault.

    files: how many of them are to be removed. another_image: one that is not pulled yet.
    """

    def __init__(self, cri: Cri, another_image: str, files: int) -> None:
        self.cri = cri
        self.agent = cri.agent
        self.another_image = another_image
        self.files = files
        self.neighbours = [cri.run() for _ in range(2)]

    def rounds(self, number: int, *, new_pods: bool = True) -> Times:
        """Use the neighbours, and let pods come and go; a call that fails fails the round."""
        times = Times()
        for count in range(number):
            neighbour = self.neighbours[count % len(self.neighbours)]
            with times.of("ListContainers"):
                self.agent.runtime.ListContainers(
                    pb.ListContainersRequest(), timeout=LONGEST_SECONDS
                )
            with times.of("ListPodSandbox"):
                self.agent.runtime.ListPodSandbox(
                    pb.ListPodSandboxRequest(), timeout=LONGEST_SECONDS
                )
            with times.of("ContainerStatus"):
                assert neighbour.status.state == pb.CONTAINER_RUNNING
            with times.of("ExecSync"):
                assert neighbour.exec("echo", "well").stdout == b"well\n"
            with times.of("ContainerStats"):
                self.agent.runtime.ContainerStats(
                    pb.ContainerStatsRequest(container_id=neighbour.id), timeout=LONGEST_SECONDS
                )
            if new_pods:
                self._comes_and_goes(times)
        return times

    def _comes_and_goes(self, times: Times) -> None:
        with times.of("RunPodSandbox"):
            pod = self.cri.pod()
        with times.of("CreateContainer"):
            container = pod.container()
        with times.of("StartContainer"):
            container.start()
        with times.of("StopPodSandbox"):
            pod.stop()
        with times.of("RemovePodSandbox"):
            pod.remove()

    @property
    def memory_mib(self) -> float:
        return resident_mib(self.agent.pid)


def resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / (1 << 20)


class Calls:
    """Calls that are under way at the same time."""

    def __init__(self) -> None:
        self._calls: dict[str, tuple[Any, float]] = {}
        self._ends: dict[str, float] = {}

    def ask(self, step: str, method: Any, request: Any) -> None:
        call = method.future(request, timeout=2 * PATIENCE_SECONDS)
        self._calls[step] = call, time.monotonic()
        call.add_done_callback(lambda _: self._ends.setdefault(step, time.monotonic()))

    def cancel(self) -> None:
        for call, _ in self.calls:
            call.cancel()

    def wait(self, seconds: float) -> list[Outcome]:
        """What they have come to, after so many seconds at most."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not all(call.done() for call, _ in self.calls):
            time.sleep(0.02)
        return [self._outcome(step, *asked) for step, asked in self._calls.items()]

    @property
    def calls(self) -> list[tuple[Any, float]]:
        return list(self._calls.values())

    def _outcome(self, step: str, call: Any, began: float) -> Outcome:
        if not call.done():
            return Outcome(step, None, "", time.monotonic() - began)
        seconds = self._ends.get(step, time.monotonic()) - began
        return Outcome(step, call.code(), call.details() or "", seconds)


@dataclass(slots=True)
class Sufferer:
    """The pod that a fault hits: a container that runs, and one that is created.

    further: calls besides the usual ones, with their names.
    """

    pod: Pod
    main: Container
    parked: Container
    further: list[tuple[str, Any, Any]] = field(default_factory=list)

    @property
    def _runtime(self) -> rpc.RuntimeServiceStub:
        return self.pod.cri.agent.runtime

    def ask_all(self) -> Calls:
        """Every call that needs its supervisor, its processes or its files, at once."""
        calls, runtime, main = Calls(), self._runtime, self.main.id
        config = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name="late"),
            image=pb.ImageSpec(image=self.pod.cri.image),
            command=["sleep", "1000"],
            log_path="late.log",
        )
        asked: list[tuple[Any, Any]] = [
            (
                runtime.PodSandboxStatus,
                pb.PodSandboxStatusRequest(pod_sandbox_id=self.pod.id, verbose=True),
            ),
            (
                runtime.ContainerStatus,
                pb.ContainerStatusRequest(container_id=main, verbose=True),
            ),
            (
                runtime.ExecSync,
                pb.ExecSyncRequest(container_id=main, cmd=["true"], timeout=5),
            ),
            (
                runtime.CreateContainer,
                pb.CreateContainerRequest(
                    pod_sandbox_id=self.pod.id, config=config, sandbox_config=self.pod.config
                ),
            ),
            (
                runtime.UpdateContainerResources,
                pb.UpdateContainerResourcesRequest(
                    container_id=main, linux=pb.LinuxContainerResources(cpu_shares=512)
                ),
            ),
            (runtime.ReopenContainerLog, pb.ReopenContainerLogRequest(container_id=main)),
            (runtime.ContainerStats, pb.ContainerStatsRequest(container_id=main)),
            (runtime.ListContainerStats, pb.ListContainerStatsRequest()),
            (runtime.ListPodSandboxMetrics, pb.ListPodSandboxMetricsRequest()),
            (runtime.Status, pb.StatusRequest(verbose=True)),
            (runtime.StartContainer, pb.StartContainerRequest(container_id=self.parked.id)),
        ]
        for method, request in asked:
            calls.ask(type(request).__name__.removesuffix("Request"), method, request)
        for step, method, request in self.further:
            calls.ask(step, method, request)
        return calls

    def ask_to_stop(self) -> Calls:
        calls = Calls()
        calls.ask(
            "StopContainer",
            self._runtime.StopContainer,
            pb.StopContainerRequest(container_id=self.main.id, timeout=0),
        )
        calls.ask(
            "StopPodSandbox",
            self._runtime.StopPodSandbox,
            pb.StopPodSandboxRequest(pod_sandbox_id=self.pod.id),
        )
        return calls


@contextmanager
def world(
    root: Path,
    registry: Registry,
    *,
    on_disk: bool = False,
    files: int = 2000,
    code: Path | None = None,
) -> Iterator[World]:
    """An agent of its own, which must end with 0 once all pods are removed.

    on_disk: its root directory is a file system of its own, of 256 MiB. code: as in `RunningAgent`.
    """
    agent = RunningAgent(root)
    agent.code = code
    agent.trust(registry.host)
    with disk(root / "lib") if on_disk else nullcontext():
        agent.start()
        try:
            large = images.bench_pull()
            another = f"{registry.host}/{large.repository}:{large.tags[0]}"
            yield World(client(agent, registry), another, files)
        finally:
            agent.remove_pods()
            status = agent.stop()
        assert status == 0, agent.log.read_text()[-4000:]


@contextmanager
def disk(point: Path) -> Iterator[None]:
    """An ext4 in a file, mounted here."""
    image = point.with_name(f"{point.name}.ext4")
    with image.open("wb") as file:
        file.truncate(256 << 20)
    point.mkdir(exist_ok=True)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(point)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(point)], check=True)
