"""Faults of the processes of one agent, one after the other: each is over when what was hit works again.

Nothing is signalled by name: pids come from the agent's own state directory, and belong to pods of its own.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import msgspec

from nodeagent.api import runtime_pb2 as pb
from tests.chaos.history.record import Fault, History
from tests.e2e.test_recovery import processes_titled
from tests.support.node import RunningAgent

WEIGHTS = {
    "kill agent": 5,
    "kill supervisor": 10,
    "kill launcher": 4,
    "kill agent, supervisor": 4,
    "kill agent, launcher": 2,
    "kill launcher, supervisor": 3,
    "end agent": 2,
    "stop agent": 2,
    "stop supervisor": 6,
    "stop launcher": 3,
    "stop supervisor, kill agent": 1,
    "stop launcher, kill agent": 1,
    "stop launcher, kill supervisor": 3,
}
STOPPED_SECONDS = (0.3, 1.0, 3.0)
SETTLE_SECONDS = 60.0
PAUSE_SECONDS = 0.02
STATES = "*/containers/*/state.json"


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A fault that comes when so many calls have been made. choice: which pod it hits, and for how long it stops."""

    after: int
    kind: str
    choice: int


def plans(seed: int, calls: int, every: int) -> list[Plan]:
    """Those of a run of so many calls."""
    rng = random.Random(f"{seed}/faults")
    kinds, weights = list(WEIGHTS), list(WEIGHTS.values())
    return [
        Plan(
            after=after + rng.randrange(every),
            kind=rng.choices(kinds, weights)[0],
            choice=rng.randrange(1 << 16),
        )
        for after in range(every, calls, every)
    ]


class Faults:
    """Puts plans into effect on an agent, and records them."""

    def __init__(self, agent: RunningAgent, history: History) -> None:
        self._agent = agent
        self._history = history
        self._pods = agent.root / "run/pods"

    def strike(self, plan: Plan) -> None:
        """Return when what was hit works again, or SETTLE_SECONDS later."""
        begin = time.time_ns()
        pod = self._choose(plan.choice)
        seconds = STOPPED_SECONDS[plan.choice % len(STOPPED_SECONDS)]
        before = self._alive().keys()
        loose = self._loose_before(plan, pod)
        lacking: tuple[str, ...] = ()
        with suppress(ProcessLookupError):  # the pod went meanwhile
            self._do(plan.kind, pod, seconds)
        if "kill launcher" in plan.kind or "kill supervisor" in plan.kind:
            lacking = self._settle(before)
        self._history.add(
            Fault(
                kind=plan.kind,
                begin=begin,
                end=time.time_ns(),
                loose=tuple(sorted(loose | {*lacking})),
                lacking=lacking,
            )
        )

    def _do(self, kind: str, pod: str, seconds: float) -> None:
        match kind.split(", "):
            case ["end agent"]:
                self._agent.stop()
                self._agent.start()
            case ["stop agent"]:
                with _stopped(self._agent.pid):
                    time.sleep(seconds)
            case ["stop supervisor", *others]:
                with _stopped(self._supervisor(pod)):
                    self._do_all(others, pod)
                    time.sleep(seconds)
            case ["stop launcher", *others]:
                with _stopped(self._launcher()):
                    self._do_all(others, pod)
                    time.sleep(seconds)
            case kinds:
                self._do_all(kinds, pod)

    def _do_all(self, kinds: list[str], pod: str) -> None:
        """The agent comes back last, after everything else has been hit."""
        if "kill agent" in kinds:
            self._agent.kill()
        try:
            if "kill launcher" in kinds:
                os.kill(self._launcher(), signal.SIGKILL)
            if "kill supervisor" in kinds:
                os.kill(self._supervisor(pod), signal.SIGKILL)
        finally:
            if "kill agent" in kinds:
                self._agent.start()

    # --- who is hit ------------------------------------------------------------------------------------------------

    def _choose(self, choice: int) -> str:
        """One of the pods that are there; warm slots are among them."""
        names = sorted(path.name for path in self._pods.iterdir())
        return names[choice % len(names)] if names else ""

    def _supervisor(self, pod: str) -> int:
        return _first(f"nodeagent.sandbox.supervisor {pod}")

    def _launcher(self) -> int:
        return _first(f"nodeagent.sandbox.launcher {self._agent.root}/run")

    # --- what holds containers -------------------------------------------------------------------------------------

    def _alive(self) -> dict[str, set[str]]:
        """The pipes of each container whose process is not reaped yet."""
        found = ((path.parent.name, _facts(path)) for path in self._pods.glob(STATES))
        return {
            name: pipes for name, (pid, pipes) in found if pid and Path(f"/proc/{pid}").exists()
        }

    def _loose_before(self, plan: Plan, pod: str) -> set[str]:
        """Containers whose processes and pipes nobody has then: by the kind of the fault, or for lack of a launcher."""
        if "kill supervisor" not in plan.kind:
            return set()
        mine = {path.name for path in (self._pods / pod / "containers").glob("*")}
        if "kill launcher" in plan.kind or not self._has_parent(pod):
            return mine
        alive, held = self._alive(), self._held()
        made = {path.parent.name for path in (self._pods / pod).glob("containers/*/state.json")}
        return {name for name in mine if name not in made or not alive.get(name, set()) <= held}

    def _has_parent(self, pod: str) -> bool:
        """Whether the launcher has forked its supervisor, whose children it gets; one that came later does not."""
        try:
            stat = Path(f"/proc/{self._supervisor(pod)}/stat").read_text()
            return int(stat.rpartition(")")[2].split()[1]) == self._launcher()
        except OSError:
            return False

    def _held(self) -> set[str]:
        try:
            return set(_open_in(self._launcher()))
        except OSError:
            return set()

    def _settle(self, before: AbstractSet[str]) -> tuple[str, ...]:
        """Wait until each pod has a supervisor, and the launcher copies of all containers; returns which lack that."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            held = self._held()
            missing = {name for name, pipes in self._alive().items() if not pipes <= held}
            lacking = tuple(sorted(missing & before)) + self._without_supervisor()
            if not lacking or time.monotonic() > deadline:
                return lacking
            time.sleep(PAUSE_SECONDS)

    def _without_supervisor(self) -> tuple[str, ...]:
        """READY pods for which the agent is not connected to a supervisor that lives."""
        runtime, found = self._agent.runtime, []
        ready = pb.PodSandboxFilter(state=pb.PodSandboxStateValue(state=pb.SANDBOX_READY))
        for pod in runtime.ListPodSandbox(pb.ListPodSandboxRequest(filter=ready)).items:
            request = pb.PodSandboxStatusRequest(pod_sandbox_id=pod.id, verbose=True)
            with suppress(grpc.RpcError):  # it was removed meanwhile
                info = runtime.PodSandboxStatus(request).info["info"]
                living = processes_titled(f"nodeagent.sandbox.supervisor {pod.id}")
                if json.loads(info)["pid"] not in set(living):
                    found.append(pod.id)
        return tuple(found)


def _first(title: str) -> int:
    for pid in processes_titled(title):
        return pid
    raise ProcessLookupError(title)


@contextmanager
def _stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _facts(state: Path) -> tuple[int, set[str]]:
    with suppress(OSError, ValueError, KeyError):
        facts = json.loads(state.read_text())
        return facts["pid"], {f"pipe:[{inode}]" for inode in facts["pipes"].values()}
    return 0, set()


def _open_in(pid: int) -> Iterator[str]:
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it is busy
            yield os.readlink(file)


def run(
    faults: Faults, wanted: list[Plan], calls: Callable[[], int], over: Callable[[], bool]
) -> int:
    """Strike as the number of calls reaches each plan; returns how many did."""
    struck = 0
    for plan in wanted:
        while calls() < plan.after:
            if over():
                return struck
            time.sleep(PAUSE_SECONDS)
        faults.strike(plan)
        struck += 1
    return struck
