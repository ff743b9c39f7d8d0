"""Supervision: every pod stays connected to a living supervisor, and its records agree with what that observed.

A supervisor that died is replaced by a successor, which gets the log pipes and pids that the launcher kept; the
containers notice nothing. What ended in between is read from exit records; only what has no record is unknown.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

from nodeagent import records
from nodeagent.errors import IncompatibleVersion, NodeAgentError, Unavailable
from nodeagent.lifecycle.inventory import Inventory, Pod
from nodeagent.lifecycle.supervisors.launchers import Launchers
from nodeagent.records import Container
from nodeagent.sandbox import exits
from nodeagent.sandbox.agent.client import Supervisor
from nodeagent.sandbox.agent.connector import SOCKETS, Connector
from nodeagent.sandbox.spec import Exit
from nodeagent.tasks import Tasks

log = logging.getLogger(__name__)

PAUSES_SECONDS = (0.1, 0.3, 1.0)
ANSWER_SECONDS = 5.0
REACH_SECONDS = 20.0  # of a successor, it takes some milliseconds


class Supervision:
    """Watches supervisors, replaces dead ones, and writes the ends of containers into their records."""

    def __init__(
        self,
        inventory: Inventory,
        launchers: Launchers,
        directory: Path,
        tasks: Tasks,
        connector: Connector = SOCKETS,
    ) -> None:
        self._inventory = inventory
        self._launchers = launchers
        self._directory = directory
        self._connector = connector
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._ends: dict[str, asyncio.Event] = {}
        self._early: dict[str, Exit] = {}
        self._tasks = tasks.part()
        self._ending: set[str] = set()
        # How a pod is ended that can do nothing any more: `Sandboxes.stop`, which is above us.
        self.end_pod: Callable[[str], Coroutine[Any, Any, None]]
        # How a container is killed without its supervisor: `Stopping.kill`, above us as well.
        self.kill: Callable[[Container], Coroutine[Any, Any, None]]

    def watch(self, sandbox_id: str, supervisor: Supervisor) -> None:
        """Note the ends of the pod's containers from now on, and replace its supervisor if it dies."""
        supervisor.on_exit = self._exited
        supervisor.on_init_exit = partial(self._init_exited, sandbox_id)
        self._watches[sandbox_id] = self._tasks.keep(
            "succession", partial(self._succeed, sandbox_id, supervisor), about=_pod(sandbox_id)
        )

    def unwatch(self, sandbox_id: str) -> None:
        """Stop watching a supervisor that is about to end on purpose."""
        task = self._watches.pop(sandbox_id, None)
        if task is not None:
            task.cancel()

    async def adopt(self, sandbox_id: str) -> None:
        """Take a pod over from the agent before us. One that this release does not understand is left as it is.

        Raises TimeoutError where its supervisor has died and a successor does not come up: a container can block that
        with its pipe, which the successor drains.
        """
        async with asyncio.timeout(REACH_SECONDS):
            supervisor = await self.reach(sandbox_id)
        self._inventory.pods[sandbox_id] = Pod(supervisor)
        self.watch(sandbox_id, supervisor)
        await self.recover(
            _pod(sandbox_id), partial(self._reconcile_adopted, sandbox_id, supervisor)
        )

    async def recover(self, what: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do what recovery asks of a supervisor until it succeeds, and wait for it ANSWER_SECONDS at most.

        A container may hold a supervisor up, and one pod's failure must not keep the node from starting: the work goes
        on in the background, until `close` at the latest. what: the object that the work is about, in the log.
        """
        task = self._tasks.keep("recovery", work, about=what)
        await asyncio.wait((task,), timeout=ANSWER_SECONDS)
        if not task.done():
            log.warning("%s: the supervisor does not answer yet", what)

    async def reach(self, sandbox_id: str) -> Supervisor:
        """The pod's supervisor, or a successor of one that has died. One may just be coming, or going."""
        for pause in PAUSES_SECONDS:
            try:
                return await self._reach(sandbox_id)
            except (NodeAgentError, OSError) as error:
                log.warning('pod "%s": no supervisor, trying again: %s', sandbox_id, error)
                await asyncio.sleep(pause)
        return await self._reach(sandbox_id)

    async def shut_down(self, sandbox_id: str) -> None:
        """End the pod's processes and its supervisor; the records of its containers then say how they ended."""
        self.unwatch(sandbox_id)
        pod = self._inventory.pods.get(sandbox_id)
        if pod is not None and pod.supervisor is not None:
            if pod.supervisor.is_lost:
                await self._launchers.get()
            await pod.supervisor.shutdown()
            pod.supervisor = None
        for container in self._inventory.members(sandbox_id):
            if container.state == "running":
                self._ended_unheard(container)

    async def ended(self, container_id: str) -> None:
        """Return once the container's record says that it is not running."""
        container = self._inventory.containers.get(container_id)
        if container is not None and container.state == "running":
            await self._ends.setdefault(container_id, asyncio.Event()).wait()

    async def close(self) -> None:
        """Replace no supervisor any more, and end what goes on in the background."""
        await self._tasks.close()

    # --- starts and ends ---

    def started(self, container: Container, at: int) -> None:
        """Publish that a container runs, and at once its end where the news of that came first."""
        self._inventory.note(records.started(container, at), "started")
        end = self._early.pop(container.id, None)
        if end is not None:
            self._exited(container.id, end)

    def ended_as(self, container: Container) -> None:
        """Publish that a container has ended, and wake those who wait for it."""
        self._inventory.note(container, "stopped")
        event = self._ends.pop(container.id, None)
        if event is not None:
            event.set()

    def _exited(self, container_id: str, end: Exit) -> None:
        container = self._inventory.containers.get(container_id)
        if container is None or container.state == "exited":
            return
        if container.state == "created":
            self._early[container_id] = end
        else:
            self.ended_as(records.exited(container, end["code"], end["at"], oom=end["oom"]))

    def _init_exited(self, sandbox_id: str) -> None:
        """No container can be created in the pod any more: it ends, so that its owner makes another one."""
        if sandbox_id in self._ending:
            return  # each answer of its supervisor tells it again
        log.error('pod sandbox "%s": the process that holds its PID namespace has died', sandbox_id)
        self._ending.add(sandbox_id)
        # Until the pod has ended: READY, and without a process that runs, nobody else would end it.
        self._tasks.keep("pod end", partial(self._end, sandbox_id), about=_pod(sandbox_id))

    async def _end(self, sandbox_id: str) -> None:
        if sandbox_id in self._inventory.pods:
            await self.end_pod(sandbox_id)
        self._ending.discard(sandbox_id)

    def _ended_unheard(self, container: Container) -> None:
        """Record an end of which no event arrived: take the exit from its record."""
        end = exits.read(str(self._directory / container.sandbox_id), container.id)
        if end is None:
            self.ended_as(records.lost(container, time.time_ns()))
        else:
            self._exited(container.id, end)

    # --- succession ---

    async def _succeed(self, sandbox_id: str, supervisor: Supervisor) -> None:
        """Replace a supervisor when it has died. Whatever fails, the next attempt goes on from there."""
        await supervisor.lost.wait()
        pod = self._inventory.pods.get(sandbox_id)
        if pod is None:
            return
        if pod.supervisor is supervisor:
            log.warning('pod sandbox "%s": its supervisor died, starting a successor', sandbox_id)
            pod.supervisor = await self._reach(sandbox_id)
            self.watch(sandbox_id, pod.supervisor)
        successor = pod.supervisor
        if successor is None or successor.is_lost:
            return  # the pod has ended, or the successor died as well, and is watched
        await self._reconcile_or_leave(sandbox_id, successor)

    async def _reach(self, sandbox_id: str) -> Supervisor:
        directory = self._directory / sandbox_id
        try:
            return await Supervisor.connect(directory, sandbox_id, self._connector)
        except OSError:
            launcher = await self._launchers.get()
        try:
            return await launcher.successor(sandbox_id, directory)
        except IncompatibleVersion as error:
            return Supervisor.refused(directory, sandbox_id, error, self._connector)

    async def _reconcile_or_leave(self, sandbox_id: str, supervisor: Supervisor) -> None:
        """Like `_reconcile`; a pod that this release does not understand is left as it is."""
        try:
            await self._reconcile(sandbox_id, supervisor)
        except IncompatibleVersion as error:
            log.error("%s: is left as it is: %s", _pod(sandbox_id), error)

    async def _reconcile_adopted(self, sandbox_id: str, supervisor: Supervisor) -> None:
        """Like `_reconcile_or_leave`; if the supervisor has died, its successor is asked instead (`_succeed`)."""
        try:
            await self._reconcile_or_leave(sandbox_id, supervisor)
        except Unavailable:
            if not supervisor.is_lost:
                raise

    async def _reconcile(self, sandbox_id: str, supervisor: Supervisor) -> None:
        """Bring the records to what the supervisor knows; a container that it does not know has ended unseen."""
        # Before the question: what is created while it is answered is not in the answer.
        asked_for = {c.id for c in self._inventory.members(sandbox_id) if c.created_at}
        known = {state.id: state for state in await supervisor.state()}
        recorded = self._inventory.containers.keys() | self._inventory.unreadable
        for stranger in known.keys() - recorded:
            await supervisor.remove(stranger)  # made for a caller that was never told
        unknown: list[Container] = []
        for container in self._inventory.members(sandbox_id):
            if not container.created_at or container.state == "exited":
                continue
            state = known.get(container.id)
            if state is None:
                if container.id in asked_for:
                    unknown.append(container)
                continue
            if state.started_at and container.state == "created":
                self.started(container, state.started_at)
            if state.exit is not None:
                self._exited(container.id, state.exit)
        for container in unknown:
            await self._lose(container)

    async def _lose(self, container: Container) -> None:
        """Record the end of a container that its supervisor does not know, and kill what may still run of it.

        A supervisor that has found the container's files damaged, or gone, does not know whether it runs.
        """
        log.warning('container "%s": unknown to its supervisor; killed, if it runs', container.id)
        await self.kill(container)
        current = self._inventory.containers.get(container.id)
        if current is not None and current.state != "exited":
            self.ended_as(records.lost(current, time.time_ns()))


def _pod(sandbox_id: str) -> str:
    return f'pod sandbox "{sandbox_id}"'
