"""One fault, from the times before it to the removal of what it hit; and the judgement of what was seen."""

import os
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from tests.chaos.gray.faults import Fault
from tests.chaos.gray.world import LONGEST_SECONDS, Calls, Outcome, Sufferer, Times, World
from tests.support.node import PATIENCE_SECONDS

MEMORY_MIB = 50.0
LONG = ("PullImage",)  # which may take as long as a registry does


@dataclass(slots=True)
class Report:
    """during: what had no answer while the fault lasted waits. after: the same calls, once it has ended."""

    fault: Fault
    before: Times = field(default_factory=Times)
    meanwhile: Times = field(default_factory=Times)
    memory_mib: float = 0.0
    during: list[Outcome] = field(default_factory=list)
    after: list[Outcome] = field(default_factory=list)
    removed_after: float = 0.0
    complaints: list[str] = field(default_factory=list)

    @property
    def ratios(self) -> dict[str, float]:
        """How many times longer the median of each call of a neighbour took."""
        return {
            call: self.meanwhile.median(call) / self.before.median(call)
            for call in self.meanwhile.seconds
        }

    @property
    def ratio(self) -> float:
        """The same of all calls together."""
        calls = self.meanwhile.seconds
        before = sum(map(self.before.median, calls))
        return sum(map(self.meanwhile.median, calls)) / before if calls else 0.0


def run(fault: Fault, world: World, folder: Path, *, rounds: int, hold: float) -> Report:
    """rounds: of the neighbours' calls. hold: seconds that the fault lasts, for what does not end by itself."""
    report = Report(fault)
    world.rounds(1)
    report.before = world.rounds(rounds)
    memory = world.memory_mib
    with contextmanager(fault.inflict)(world, folder) as sufferer:
        calls = sufferer.ask_all()
        _use_neighbours(report, world, rounds)
        report.during += calls.wait(hold)
        stops = sufferer.ask_to_stop()
        _use_neighbours(report, world, rounds)
        report.during += stops.wait(hold)
        report.memory_mib = world.memory_mib - memory
    report.after = [*calls.wait(PATIENCE_SECONDS), *stops.wait(PATIENCE_SECONDS)]
    _remove(report, sufferer, (calls, stops))
    report.complaints += complaints(report)
    return report


def _use_neighbours(report: Report, world: World, rounds: int) -> None:
    if report.fault.stops == "everything" or report.complaints:
        return
    try:
        times = world.rounds(rounds, new_pods=report.fault.stops == "nothing")
    except (grpc.RpcError, AssertionError) as error:
        report.complaints.append(f"a neighbour's call: {error!r}")
        return
    for call, seconds in times.seconds.items():
        report.meanwhile.seconds[call] += seconds


def _remove(report: Report, sufferer: Sufferer, asked: tuple[Calls, ...]) -> None:
    """A retry of what has failed succeeds now; then nothing of the pod is left."""
    for calls in asked:
        calls.cancel()
    began = time.monotonic()
    try:
        sufferer.pod.stop()
        sufferer.pod.remove()
    except grpc.RpcError as error:
        report.complaints.append(f"the pod cannot be removed: {error.details()}")
        return
    report.removed_after = time.monotonic() - began
    report.complaints += [f"left: {path}" for path in left_of(sufferer)]


def left_of(sufferer: Sufferer) -> list[str]:
    """What there is of the pod and its containers, in the state directory, the root directory and the groups."""
    root, ids = sufferer.pod.cri.agent.root, (sufferer.pod.id, sufferer.main.id, sufferer.parked.id)
    places = [root / "run/pods" / ids[0], *(root / "lib/containers" / each for each in ids[1:])]
    found = [str(place) for place in places if place.exists()]
    groups = (path for path, _, _ in os.walk("/sys/fs/cgroup"))
    return found + [path for path in groups if any(each in path for each in ids)]


def complaints(report: Report) -> list[str]:
    """What a gray failure may not do; the ratios are measurements, which depend on the machine."""
    found = []
    if report.meanwhile.seconds and report.meanwhile.longest > LONGEST_SECONDS:
        found.append(f"a neighbour's call took {report.meanwhile.longest:.1f} s")
    if report.memory_mib > MEMORY_MIB:
        found.append(f"the agent takes {report.memory_mib:.0f} MiB more")
    found += [
        f"no clear answer: {outcome.step}: {outcome}"
        for outcome in report.during
        if outcome.code is not None and not outcome.is_clear
    ]
    found += [
        f"no answer after the end of the fault: {outcome.step}"
        for outcome in report.after
        if outcome.code is None and outcome.step != "PullImage"
    ]
    return found
