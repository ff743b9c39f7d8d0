"""One run: an agent, clients that execute programs on it, readers of its events, and faults; then the verdict."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import grpc

from nodeagent.api import runtime_pb2 as pb
from tests.chaos.history import faults, program
from tests.chaos.history.clearing import Clearing, ending
from tests.chaos.history.client import Client, Places
from tests.chaos.history.events import READERS, Reader
from tests.chaos.history.faults import Faults, Plan
from tests.chaos.history.model import PATIENCE_SECONDS, SECOND, Model, Violation
from tests.chaos.history.program import Step
from tests.chaos.history.record import Call, Ending, Event, Fault, History, Line
from tests.chaos.oracles import Footprint
from tests.support import images
from tests.support.node import RunningAgent
from tests.support.registry import Registry

CLIENTS = 8
FIRST_PORT = 20_000  # below those that the kernel gives away


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What a run does: the steps of each client by its number, and the faults."""

    programs: dict[int, list[Step]]
    plans: list[Plan]

    @property
    def calls(self) -> int:
        return sum(map(len, self.programs.values()))


def script(seed: int, calls: int, every: int, clients: int = CLIENTS) -> Script:
    """What a seed stands for. calls: steps of all clients; every: so many there are for one fault."""
    each = calls // clients
    programs = {
        client: list(islice(program.steps(seed, client), each)) for client in range(clients)
    }
    return Script(programs=programs, plans=faults.plans(seed, calls, every))


@dataclass(slots=True)
class Outcome:
    violations: list[Violation] = field(default_factory=list)
    history: History = field(default_factory=History)
    seconds: float = 0.0

    @property
    def longest(self) -> str:
        """The fault that was over last after its begin, most of them with a start of the agent."""
        faults = [line for line in self.history.lines if isinstance(line, Fault)]
        seconds, kind = max(
            (((fault.end - fault.begin) / SECOND, fault.kind) for fault in faults),
            default=(0.0, "none"),
        )
        return f"{kind}, {seconds:.0f} s"

    @property
    def counts(self) -> Counter[str]:
        lines = self.history.lines
        return Counter(
            calls=self.history.calls,
            faults=sum(isinstance(line, Fault) for line in lines),
            unsettled=sum(isinstance(line, Fault) and bool(line.lacking) for line in lines),
            pods=sum(line.rpc == "RunPodSandbox" and bool(line.told) for line in _calls(lines)),
            containers=sum(
                line.rpc == "CreateContainer" and bool(line.told) for line in _calls(lines)
            ),
            codes=sum(isinstance(line, Ending) and line.code is not None for line in lines),
            events=sum(isinstance(line, Event) for line in lines),
            violations=len(self.violations),
        )


def run(
    wanted: Script,
    root: Path,
    registry: Registry,
    patience: float = PATIENCE_SECONDS,
    code: Path | None = None,
) -> Outcome:
    """Execute it on an agent of its own below `root`, which is gone afterwards. code: as in `RunningAgent`."""
    begin = time.monotonic()
    outcome = Outcome()
    agent = RunningAgent(root)
    agent.code = code
    agent.trust(registry.host)
    footprint = Footprint(agent)
    before = Counter[str]()
    try:
        agent.start()
        places = _places(agent, registry)
        agent.stop()
        before = footprint.now()
        agent.start()
        outcome.violations += _execute(wanted, agent, outcome.history, places, patience)
    except (OSError, RuntimeError, AssertionError, grpc.RpcError) as error:
        outcome.violations.append(Violation("serves", "", f"{type(error).__name__}: {error}"))
        _give_up(agent)
    except KeyboardInterrupt:
        _give_up(agent)
        raise
    outcome.violations += Model(outcome.history.lines, patience).violations()
    outcome.violations += [Violation("left", "", each) for each in footprint.new_since(before)]
    outcome.seconds = time.monotonic() - begin
    return outcome


def _execute(
    wanted: Script, agent: RunningAgent, history: History, places: Places, patience: float
) -> list[Violation]:
    readers = [Reader(number, agent.endpoint, history) for number in range(READERS)]
    try:
        _drive(wanted, agent, history, places)
        found = list(Clearing(agent, history, places, patience).run(readers))
    finally:
        for reader in readers:
            reader.close()
        for log in places.logs.glob("*.log"):
            history.add(ending(places, log.stem))
    if agent.stop() != 0:
        found.append(Violation("left", "", "the agent did not end in order"))
    return found


def _give_up(agent: RunningAgent) -> None:
    """Remove what is left as well as another agent can."""
    with suppress(OSError, RuntimeError, grpc.RpcError):
        agent.restart()
        agent.remove_pods()
    with suppress(OSError):
        agent.stop()


def _places(agent: RunningAgent, registry: Registry) -> Places:
    busybox = images.busybox()
    reference = f"{registry.host}/{busybox.repository}:{busybox.tags[0]}"
    request = pb.PullImageRequest(image=pb.ImageSpec(image=reference))
    agent.images.PullImage(request, timeout=PATIENCE_SECONDS)
    places = Places(reference, agent.root / "codes", agent.root / "logs", FIRST_PORT)
    places.codes.mkdir()
    places.logs.mkdir()
    return places


def _drive(wanted: Script, agent: RunningAgent, history: History, places: Places) -> None:
    """Return when all programs have ended, and the last fault is over."""
    over = threading.Event()
    clients = {
        number: Client(number, agent.endpoint, history, places) for number in wanted.programs
    }
    with ThreadPoolExecutor(len(clients) + 1) as pool:
        striking = pool.submit(
            faults.run, Faults(agent, history), wanted.plans, lambda: history.calls, over.is_set
        )
        executing = [
            pool.submit(client.execute, wanted.programs[number], over.is_set)
            for number, client in clients.items()
        ]
        try:
            for each in executing:
                each.result()
        finally:
            over.set()
        striking.result()
    for client in clients.values():
        client.close()


def _calls(lines: Sequence[Line]) -> Iterator[Call]:
    return (line for line in lines if isinstance(line, Call))
