"""Supervision: every pod stays connected to a living supervisor, and its records agree with what that observed.

A supervisor that died is replaced by a successor, which gets the log pipes and pids that the launcher kept; the
containers notice nothing. What ended in between is read from exit records; only what has no record is unknown. One that
lives, and whose connection has ended, is connected to again. What is heard through events, which are sent once, is
asked for as well: after each connection, and by `Polling`.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from nodeagent import records
from nodeagent.errors import IncompatibleVersion, NodeAgentError, Unavailable
from nodeagent.lifecycle.creations import PATIENCE_SECONDS, Creations
from nodeagent.lifecycle.inventory import Inventory, Pod
from nodeagent.lifecycle.supervisors.launchers import Launchers
from nodeagent.records import Container
from nodeagent.sandbox import exits
from nodeagent.sandbox.agent.client import NOBODY_LISTENS, Supervisor
from nodeagent.sandbox.agent.connector import SOCKETS, Connector
from nodeagent.sandbox.spec import Exit
from nodeagent.tasks import Tasks

log = logging.getLogger(__name__)

PAUSES_SECONDS = (0.1, 0.3, 1.0)


class Supervision:
    """Watches supervisors, replaces dead ones, and writes the ends of containers into their records."""

    def __init__(
        self,
        inventory: Inventory,
        launchers: Launchers,
        directory: Path,
        tasks: Tasks,
        connector: Connector = SOCKETS,
        patience_s: float = PATIENCE_SECONDS,
    ) -> None:
        """Take the parts. patience_s: of whoever waits for a start."""
        self._inventory = inventory
        self._launchers = launchers
        self._directory = directory
        self._connector = connector
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._ends: dict[str, asyncio.Event] = {}
        self._early: dict[str, Exit | None] = {}  # of containers that are being started
        self._tasks = tasks.part()
        # Starts under way, by container; one whose caller has gone is there for a retry while the container runs.
        self.starts = Creations(
            self._tasks, "container start", self._is_running, patience_s, done="started"
        )
        self._ending: set[str] = set()
        # How a pod is ended that can do nothing any more: `Sandboxes.stop`, which is above us.
        self.end_pod: Callable[[str], Coroutine[Any, Any, None]]
        # How a container is killed without its supervisor: `Stopping.kill`, above us as well.
        self.kill: Callable[[Container], Coroutine[Any, Any, None]]
        # How a TimeoutError gets to name the containers that do not end, and why: `unkillable.named`, above us as well.
        self.explains: Callable[[Iterable[Container]], AbstractContextManager[None]] = (
            lambda _containers: nullcontext()
        )

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

    def expect(self, sandbox_id: str) -> None:
        """Have a pod of the agent before us, whose supervisor is not reached yet: it can be listed, and stopped."""
        self._inventory.pods[sandbox_id] = Pod(
            self._unreached(sandbox_id, "the agent has just started")
        )

    def _unreached(self, sandbox_id: str, why: str) -> Supervisor:
        directory = self._directory / sandbox_id
        return Supervisor.unreached(directory, sandbox_id, why, self._connector)

    async def adopt(self, sandbox_id: str) -> None:
        """Take over a pod that is expected, or return if it has ended. It may be called again after each failure.

        One that this release does not understand is left as it is.
        """
        pod = self._inventory.pods.get(sandbox_id)
        if pod is None or pod.supervisor is None or pod.closing:
            return
        if sandbox_id not in self._watches:
            expected = pod.supervisor
            try:
                supervisor = await self.reach(sandbox_id)
            except (NodeAgentError, OSError) as error:
                if pod.supervisor is expected:
                    pod.supervisor = self._unreached(sandbox_id, str(error))
                raise
            if pod.supervisor is not expected or pod.closing:
                supervisor.close()  # a stop has come meanwhile: a successor would outlive the pod
                return
            pod.supervisor = supervisor
            self.watch(sandbox_id, supervisor)
        await self._reconcile_adopted(sandbox_id, pod.supervisor)

    def recover(
        self, what: str, work: Callable[[], Coroutine[Any, Any, None]]
    ) -> asyncio.Task[None]:
        """Do a part of recovery until it succeeds, in the background until `close` at the latest.

        what: the object that the work is about, in the log.
        """
        return self._tasks.keep("recovery", work, about=what)

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
            with self.explains(self._inventory.members(sandbox_id)):
                await pod.supervisor.shutdown()
        for container in self._inventory.members(sandbox_id):
            if container.state == "running":
                self._ended_unheard(container)
        if pod is not None:
            pod.supervisor = (
                None  # only now: where a record cannot be read, the pod can be stopped again
            )

    async def ended(self, container_id: str) -> None:
        """Return once the container's record says that it is not running."""
        container = self._inventory.containers.get(container_id)
        if container is not None and container.state == "running":
            await self._ends.setdefault(container_id, asyncio.Event()).wait()

    async def close(self) -> None:
        """Replace no supervisor any more, and end what goes on in the background."""
        await self._tasks.close()

    # --- starts and ends ---

    def _is_running(self, container_id: str) -> bool:
        container = self._inventory.containers.get(container_id)
        return container is not None and container.state == "running"

    @contextmanager
    def start_of(self, container_id: str) -> Iterator[None]:
        """Keep the news of an end that comes before that of the start."""
        self._early[container_id] = None
        try:
            yield
        finally:
            del self._early[container_id]

    def started(self, container: Container, at: int) -> None:
        """Publish that a container runs, and at once its end where the news of that came first."""
        self._inventory.note(records.started(container, at), "started")
        end = self._early.get(container.id)
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
            if container_id in self._early:
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
        """Replace a supervisor that has died, or connect again. Whatever fails, the next attempt goes on from there."""
        await supervisor.ended.wait()
        pod = self._inventory.pods.get(sandbox_id)
        if pod is None:
            return
        if pod.supervisor is supervisor:
            if await supervisor.has_died():
                log.warning(
                    'pod sandbox "%s": its supervisor died, starting a successor', sandbox_id
                )
            else:
                log.warning(
                    'pod sandbox "%s": the connection to its supervisor has ended', sandbox_id
                )
            successor = await self._reach(sandbox_id)
            supervisor.close()
            pod.supervisor = successor
            self.watch(sandbox_id, successor)
        current = pod.supervisor
        if current is None or current.ended.is_set():
            return  # the pod has ended, or the successor died as well, and is watched
        await self._reconcile_or_leave(sandbox_id, current)

    async def _reach(self, sandbox_id: str) -> Supervisor:
        directory = self._directory / sandbox_id
        try:
            return await Supervisor.connect(directory, sandbox_id, self._connector)
        except OSError as error:
            if error.errno not in NOBODY_LISTENS:
                raise  # it may live: there is no descriptor left, say
        launcher = await self._launchers.get()
        try:
            return await launcher.successor(sandbox_id, directory)
        except IncompatibleVersion as error:
            return Supervisor.refused(directory, sandbox_id, error, self._connector)

    async def check(self, sandbox_id: str) -> None:
        """Ask for the ends of containers that run, in case the news of one was lost.

        What starts is left to whoever starts it. A supervisor whose connection has ended is about to be asked anyway.
        """
        pod = self._inventory.pods.get(sandbox_id)
        supervisor = pod.supervisor if pod is not None else None
        if supervisor is None or supervisor.ended.is_set() or sandbox_id not in self._watches:
            return
        # That it is silent, or of a release that does not understand us, has been said.
        with suppress(Unavailable, IncompatibleVersion, TimeoutError):
            await self._reconcile(sandbox_id, supervisor, starts=False)

    async def _reconcile_or_leave(self, sandbox_id: str, supervisor: Supervisor) -> None:
        """Like `_reconcile`; a pod that this release does not understand is left as it is."""
        try:
            await self._reconcile(sandbox_id, supervisor)
        except IncompatibleVersion as error:
            log.error("%s: is left as it is: %s", _pod(sandbox_id), error)

    async def _reconcile_adopted(self, sandbox_id: str, supervisor: Supervisor) -> None:
        """Like `_reconcile_or_leave`; once its connection has ended, it or its successor is asked by `_succeed`."""
        try:
            await self._reconcile_or_leave(sandbox_id, supervisor)
        except Unavailable:
            if not supervisor.ended.is_set():
                raise

    async def _reconcile(
        self, sandbox_id: str, supervisor: Supervisor, *, starts: bool = True
    ) -> None:
        """Bring the records to what the supervisor knows; a container that it does not know has ended unseen.

        starts: also of containers that were not RUNNING as far as we know.
        """
        # Before the question: what is created while it is answered is not in the answer.
        asked_for = {
            c.id
            for c in self._inventory.members(sandbox_id)
            if (c.created_at if starts else c.state == "running")
        }
        known = {state.id: state for state in await supervisor.state()}
        recorded = self._inventory.containers.keys() | self._inventory.unreadable
        for stranger in known.keys() - recorded:
            await supervisor.remove(stranger)  # made for a caller that was never told
        unknown: list[Container] = []
        for container in self._inventory.members(sandbox_id):
            if not container.created_at or container.state == "exited":
                continue
            if not starts and container.id not in asked_for:
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
