"""One run: a plan on a simulated machine, with clients and faults, until all has come to rest."""

import asyncio
import logging
import shutil
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from nodeagent.errors import NodeAgentError
from nodeagent.lifecycle.node import Node
from tests.chaos.simulation import world
from tests.chaos.simulation.clients import Clients
from tests.chaos.simulation.faults import Faults
from tests.chaos.simulation.loop import Deadlock, Livelock, Loop
from tests.chaos.simulation.machine import Machine
from tests.chaos.simulation.oracle import Oracle
from tests.chaos.simulation.plan import Plan
from tests.chaos.simulation.service import Disconnected, Service
from tests.chaos.simulation.verdict import Violation

PATIENCE = 1500.0  # of the whole run after its last fault, in virtual seconds
LOOK_EVERY = 8
REST_SECONDS = 400.0  # the reconciliation removes what two of its looks have found
HEARD_SECONDS = 100.0  # each pod with a container that runs is asked for its state once a minute
RETRIES = 4


@dataclass
class Outcome:
    """What came of a run. violation: empty where all held."""

    violation: str
    digest: int
    turns: int
    lines: list[str]


class Run:
    def __init__(self, plan: Plan, directory: Path, *, is_traced: bool = False) -> None:
        random = Random(plan.seed)
        self.plan = plan
        self.loop = Loop(random)
        self.machine = Machine(self.loop, random, str(directory))
        self.machine.is_traced = is_traced
        self.oracle = Oracle(self.machine)
        self.service = Service(self.loop, self.machine, self.oracle, random, directory)
        self.clients = Clients(self.service, self.oracle)
        self.faults = Faults(self.service, plan.faults)
        self.log = Records(self.machine)

    # --- the whole ---

    def run(self) -> Outcome:
        world.machine = self.machine
        self.loop.on_turn = self._turn
        self.loop.on_death = self.service.ended.set
        logger = logging.getLogger("nodeagent")
        logger.addHandler(self.log)
        try:
            self.loop.run_until_complete(self._main())
            self._check_log()
        except (Violation, Deadlock, Livelock) as error:
            self.oracle.violation = self.oracle.violation or f"{type(error).__name__}: {error}"
        finally:
            logger.removeHandler(self.log)
            self._close()
        machine = self.machine
        return Outcome(self.oracle.violation, machine.digest, self.loop.turns, machine.lines)

    def _close(self) -> None:
        self.service.close()
        self.machine.life = None
        for task in self.loop.tasks:
            if not task.done():
                task.close()
        self.machine.forget_descriptors()
        self.loop.close()

    def _turn(self) -> None:
        if self.oracle.violation:
            raise Violation(self.oracle.violation)
        if self.loop.failures:
            context = self.loop.failures[0]
            raise Violation(f"unheard: {context.get('message')}: {context.get('exception')!r}")
        if self.loop.turns % LOOK_EVERY == 0 and self.service.node is not None:
            self.oracle.look(self.service.node)
            self.oracle.addresses()

    def _check_log(self) -> None:
        if self.log.bad:
            raise Violation(f"log: {self.log.bad[0]}")

    async def _main(self) -> None:
        keeper = asyncio.create_task(self.service.keep())
        faults = asyncio.create_task(self.faults.strike())
        clients = [
            asyncio.create_task(self.clients.go_through(program)) for program in self.plan.programs
        ]
        try:
            async with asyncio.timeout(PATIENCE):
                await asyncio.gather(*clients)
                await faults
                await asyncio.sleep(max([0.0, *(f.seconds for f in self.plan.faults)]))
        except TimeoutError:
            raise Violation(f"clients hang: {self.service.what_hangs()}") from None
        self.machine.windows.clear()
        self.machine.kill_at = 0
        await self._at_rest()
        self.service.is_over = True
        await self._end()
        keeper.cancel()

    # --- rest ---

    async def _bounded(self, what: str, seconds: float, work: Coroutine[Any, Any, Any]) -> Any:
        timer = asyncio.timeout(seconds)
        try:
            async with timer:
                return await work
        except TimeoutError:
            if not timer.expired():
                raise  # the agent's own
            hanging = self.service.what_hangs()
            raise Violation(f"{what}: takes more than {seconds:g} s: {hanging}") from None

    async def _insist(self, what: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """What fails is tried again: without a fault it succeeds soon."""
        error: Exception | None = None
        for _ in range(RETRIES):
            try:
                await self._bounded(what, 120.0, work())
                return
            except (NodeAgentError, OSError, Disconnected) as raised:
                error = raised
                await self.service.until_served(60.0)
                await asyncio.sleep(1.0)
        raise Violation(f"{what}: fails without a fault: {error!r}")

    async def _at_rest(self) -> None:
        await self.service.until_served(120.0)
        node = self.service.node
        if node is None:
            raise Violation(f"the agent does not start: {self.service.what_hangs()}")
        await asyncio.sleep(20.0)  # for what nobody waits for any more
        await self._all_is_heard(node)
        for sandbox in node.sandboxes.list():
            if sandbox.ready and sandbox.id not in self.machine.asked:
                await self._insist("a container", partial(self.clients.use_sandbox, sandbox))
            stop, remove = self.clients.stop_sandbox, self.clients.remove_sandbox
            await self._insist("StopPodSandbox", partial(stop, sandbox.id))
            await self._insist("RemovePodSandbox", partial(remove, sandbox.id))
        await self._insist("names", self.clients.use_names)
        await asyncio.sleep(REST_SECONDS)
        agent, node = self.service.agent, self.service.node
        if agent is None or node is None:
            raise Violation("the agent has ended by itself")
        self.oracle.look(node)
        assert self.oracle.stream is not None
        self.oracle.stream.compare(node)
        self.oracle.nothing_left(node, agent.base)

    async def _all_is_heard(self, node: Node) -> None:
        """The ends of programs become known, also those whose news was lost."""
        if self.oracle.unheard(node):
            await asyncio.sleep(HEARD_SECONDS)
        if unheard := self.oracle.unheard(node):
            raise Violation(f"the ends of {', '.join(unheard)} are not heard")

    async def _end(self) -> None:
        agent = self.service.agent
        assert agent is not None
        agent.stop.set()
        await self._bounded("SIGTERM", 60.0, self.service.ended.wait())
        await asyncio.sleep(2.0)
        self.oracle.end()


class Records(logging.Handler):
    """What the agent logs that it should not: tracebacks."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(logging.ERROR)
        self.bad: list[str] = []
        self._machine = machine

    def emit(self, record: logging.LogRecord) -> None:
        if self._machine.life is None or self._machine.life.is_dead:
            return
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and not isinstance(error, NodeAgentError | OSError):
            self.bad.append(record.getMessage())


def fresh(directory: Path) -> Path:
    for each in ("root", "state"):
        shutil.rmtree(directory / each, ignore_errors=True)
    return directory


def run_plan(plan: Plan, directory: Path, *, is_traced: bool = False) -> Outcome:
    """Run a plan in an empty directory, which is best on a tmpfs."""
    run = Run(plan, fresh(directory), is_traced=is_traced)
    return run.run()
