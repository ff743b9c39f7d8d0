"""The manager of the service, which keeps the agent running, and the calls to it."""

import asyncio
import contextvars
import sqlite3
from collections.abc import Callable, Coroutine
from contextlib import closing
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from nodeagent.config import Config, Network
from nodeagent.database import copied
from nodeagent.errors import NodeAgentError
from nodeagent.lifecycle.node import Node
from nodeagent.tasks import Caller, caller
from tests.chaos.simulation.loop import LIFE, Loop
from tests.chaos.simulation.machine import Machine
from tests.chaos.simulation.node import Agent
from tests.chaos.simulation.oracle import Oracle


class Disconnected(Exception):
    """The agent has died under a call, or does not run."""


class Service:
    """One agent after the other. told: what calls have returned."""

    def __init__(
        self, loop: Loop, machine: Machine, oracle: Oracle, random: Random, directory: Path
    ) -> None:
        self.loop = loop
        self.machine = machine
        self.oracle = oracle
        self.random = random
        self.directory = directory
        self.database = database()
        self.agent: Agent | None = None
        self.ended = asyncio.Event()
        self.is_over = False
        self.told: set[Any] = set()
        self._context = contextvars.copy_context()
        self._calls: dict[asyncio.Future[Any], None] = {}  # in order
        self._starts = 0
        self._reader: asyncio.Task[None] | None = None  # of the events of this life
        slots = self.random.choice((0, 0, 1, 2))
        self._config = Config(slots=slots, network=Network(subnet4="10.0.0.0/24"))

    # --- lives ---

    async def keep(self) -> None:
        while not self.is_over:
            await self._live()
            await asyncio.sleep(self.random.choice((0.0, 0.01, 0.2, 1.0)))

    async def _live(self) -> None:
        self._starts += 1
        agent = Agent(self._starts, self.directory, self.database, self._config)
        agent.began_ns = self.machine.time_ns()
        agent.on_serving = self._read_events
        self.agent = agent
        self.machine.life = agent.life
        self._context = contextvars.copy_context()
        self._context.run(LIFE.set, agent.life)
        self.ended.clear()
        self.machine.trace("agent starts")
        task = self.loop.create_task(agent.run(), context=self._context)
        task.set_name("agent")
        task.add_done_callback(partial(self._agent_ended, agent))
        await self.ended.wait()
        self._bereave()

    def _read_events(self, node: Node) -> None:
        outside = contextvars.Context()
        self._reader = self.loop.create_task(self.oracle.listen(node), context=outside)

    def _agent_ended(self, agent: Agent, task: "asyncio.Task[None]") -> None:
        if agent.life.is_dead:
            return
        agent.is_serving = False
        error = None if task.cancelled() else task.exception()
        left = [t for t in self.loop.tasks_of(agent.life) if t is not task]
        if error is not None and not isinstance(error, NodeAgentError | OSError | TimeoutError):
            self.oracle.violation = f"the agent ended with {error!r}"
        elif error is None and left:
            self.oracle.violation = f"tasks left: {[where(t) for t in left]}"
        self.machine.trace(f"agent ended: {error!r}")
        agent.life.is_dead = True
        self.ended.set()

    def kill(self) -> None:
        if self.agent is not None and not self.agent.life.is_dead:
            self.machine.trace("agent killed")
            self.loop.kill(self.agent.life)

    def _bereave(self) -> None:
        """Tell clients, and the machine, that the agent has gone."""
        self.machine.forget_descriptors()
        for call in list(self._calls):
            if not call.done():
                call.set_exception(Disconnected())
        self._calls.clear()
        if self._reader is not None:
            self._reader.cancel()
        if self.agent is not None:
            self.agent.is_serving = False

    def close(self) -> None:
        if self.agent is not None and not self.agent.life.is_dead:
            self.loop.kill(self.agent.life)
            self.loop.bury()
        self.database.close()

    # --- for clients ---

    @property
    def node(self) -> Node | None:
        """The node that serves; None while none does."""
        agent = self.agent
        return agent.node if agent is not None and agent.is_serving else None

    async def until_served(self, seconds: float) -> None:
        end = self.loop.time() + seconds
        while self.node is None and self.loop.time() < end:  # noqa: ASYNC110 as clients do it
            await asyncio.sleep(0.02)

    async def call(
        self,
        method: str,
        work: Callable[[Node], Coroutine[Any, Any, Any]],
        *,
        goes_on: bool = True,
    ) -> Any:
        """Call the agent, as over gRPC: what changes something goes on when its caller gives up."""
        agent, node = self.agent, self.node
        if agent is None or node is None or agent.calls is None:
            raise Disconnected
        calls = agent.calls
        answer: asyncio.Future[Any] = self.loop.create_future()
        waiting, context = Caller(), self._context.copy()
        context.run(caller.set, waiting)
        behaviour = self._answered(work(node), waiting)
        task = context.run(lambda: calls.start("rpc", behaviour, about=method))
        self._calls[answer] = None
        task.add_done_callback(partial(self._pass_on, agent, method, answer))
        try:
            result = await answer
        except asyncio.CancelledError:
            waiting.has_gone = True
            if not goes_on:
                task.cancel()
            raise
        except (NodeAgentError, OSError) as error:
            self.machine.trace(f"{method}: {type(error).__name__}: {error}")
            raise
        self.machine.trace(f"{method}: {result if isinstance(result, str) else 'ok'}")
        return result

    async def _answered(self, work: Coroutine[Any, Any, Any], waiting: Caller) -> Any:
        result = await work
        if not waiting.has_gone and isinstance(result, str):
            self.told.add(result)
        return result

    def _pass_on(
        self, agent: Agent, method: str, answer: asyncio.Future[Any], task: asyncio.Task[Any]
    ) -> None:
        """Give the result of a call to the client, if it still waits."""
        self._calls.pop(answer, None)
        if agent.life.is_dead:
            return
        error: BaseException | None = Disconnected() if task.cancelled() else task.exception()
        if not isinstance(error, NodeAgentError | OSError | Disconnected | None):
            self.oracle.violation = f"{method}: INTERNAL: {error!r}"
        if answer.done():
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(task.result())

    # --- for messages ---

    def what_hangs(self) -> str:
        tasks = self.loop.tasks_of(self.agent.life) if self.agent else []
        hanging = [f"{task.get_name()}: {where(task)}" for task in tasks if not task.done()]
        return "; ".join(hanging)[:1500]


def where(task: Any) -> str:
    """The functions that a task is in."""
    found, coro = [], task.get_coro()
    while coro is not None and hasattr(coro, "cr_frame"):
        if coro.cr_frame is not None:
            found.append(f"{coro.__name__}:{coro.cr_frame.f_lineno}")
        coro = coro.cr_await
    return ">".join(found)


_template = b""


def database() -> sqlite3.Connection:
    """A new database in memory, with its tables."""
    global _template  # noqa: PLW0603
    if not _template:
        with closing(copied(Path("/there/is/none"))) as empty:
            _template = empty.serialize()
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.deserialize(_template)
    return connection
