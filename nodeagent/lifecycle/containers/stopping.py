"""StopContainer, also for a container that does not end by itself, or whose supervisor does not answer."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial

from nodeagent.errors import (
    IncompatibleVersion,
    NodeAgentError,
    NotFound,
    Unavailable,
)
from nodeagent.lifecycle.containers import unkillable
from nodeagent.lifecycle.containers.groups import Groups
from nodeagent.lifecycle.inventory import Inventory
from nodeagent.lifecycle.supervisors.supervision import Supervision
from nodeagent.records import Container

log = logging.getLogger(__name__)

KILL_PATIENCE_SECONDS = 10.0
THAW_AFTER_SECONDS = 1.0
START_SECONDS = (
    1.0  # for a start that is under way; it takes milliseconds unless something blocks it
)
ANSWER_SECONDS = 2.0


class Stopping:
    """Ends containers: by their signal and their supervisor, and in the end by their cgroup."""

    def __init__(self, inventory: Inventory, supervision: Supervision, groups: Groups) -> None:
        self._inventory = inventory
        self._supervision = supervision
        self._groups = groups
        supervision.kill = self.kill
        supervision.explains = partial(unkillable.named, groups=groups)
        # Containers whose program is about to be executed, or is blocked before that.
        self._starting: set[str] = set()

    @contextmanager
    def start_of(self, container_id: str) -> Iterator[None]:
        """Note that a container is being started: it is not RUNNING yet, and has to be stopped nevertheless."""
        self._starting.add(container_id)
        try:
            yield
        finally:
            self._starting.discard(container_id)

    async def stop(self, name: str, timeout_s: float) -> None:
        """Signal the container, and kill it after `timeout_s`. Success when it is gone or not running.

        The supervisor keeps the earliest deadline of all requests, even if the agent ends.
        """
        try:
            container = self._inventory.container(name)
        except NotFound:
            return
        if container.id in self._starting:
            container = await self._end_start(container, timeout_s)
        if container.state != "running":
            return
        await self._ask_to_stop(container, timeout_s)
        if await self._ends_within(container, timeout_s + THAW_AFTER_SECONDS):
            return
        # A process that cgroup v1 has frozen does not die of SIGKILL before it is thawed; one of v2 does.
        self._groups.of(container).thaw()
        # The first process of its PID namespace may wait, uninterruptibly, for another one of the container.
        await asyncio.to_thread(self._groups.of(container).kill)
        if not await self._ends_within(container, KILL_PATIENCE_SECONDS):
            raise TimeoutError(self._why_not_ended(container))

    def _why_not_ended(self, container: Container) -> str:
        if silent := self._inventory.supervisor(container).silent:
            return (
                f'container "{container.id}": killed, but the supervisor of its pod, which is to tell its end, '
                f"does not: {silent}"
            )
        return unkillable.explained(container, self._groups.of(container))

    async def _end_start(self, container: Container, timeout_s: float) -> Container:
        """The container's record once its start is over, which is forced if another container blocks it (ptrace).

        While poststart hooks run its program is running already, and has the caller's timeout to end. Raises
        TimeoutError where the start does not end either way.
        """
        if not await self._start_ends_within(container, START_SECONDS):
            may_run = any(hook.stage == "poststart" for hook in container.config.hooks)
            runs_s = timeout_s if may_run else 0
            await self._ask_to_stop(container, runs_s)
            if not await self._start_ends_within(container, runs_s + KILL_PATIENCE_SECONDS):
                raise TimeoutError(self._why_not_ended(container))
        return self._inventory.containers.get(container.id, container)

    async def _start_ends_within(self, container: Container, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds), self._inventory.lock(container.id):
                return True
        except TimeoutError:
            return False

    async def _ask_to_stop(self, container: Container, timeout_s: float) -> None:
        """Have the supervisor stop it; if that does not answer in time, kill the container's cgroup.

        A process in the middle of splice(2) to or from a pipe holds its lock for as long as the other side takes, and
        whoever reads the pipe waits for that uninterruptibly: so a container can block its supervisor until it is
        killed.
        """
        supervisor = self._inventory.supervisor(container)
        try:
            async with asyncio.timeout(timeout_s + ANSWER_SECONDS):
                await supervisor.stop(container.id, container.stop_signal, round(timeout_s * 1000))
        except TimeoutError:
            log.warning('container "%s": its supervisor does not answer; killed', container.id)
            await asyncio.to_thread(self._groups.of(container).kill)

    async def _ends_within(self, container: Container, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._supervision.ended(container.id)
        except TimeoutError:
            return False
        return True

    async def stop_all(self, sandbox_id: str) -> None:
        """Kill every container of a pod, all at once; raises when one of them does not end.

        Where a supervisor has died, does not answer, or does not understand us, the agent kills.
        """
        members = self._inventory.members(sandbox_id)
        running = [c for c in members if c.state == "running" or c.id in self._starting]
        results = await asyncio.gather(
            *(self.stop(container.id, 0) for container in running), return_exceptions=True
        )
        pod = self._inventory.pods.get(sandbox_id)
        is_silent = pod is not None and pod.supervisor is not None and bool(pod.supervisor.silent)
        # A silent one does not tell the end of what was killed either; it is ended with its pod.
        unasked = (IncompatibleVersion, Unavailable) + ((TimeoutError,) if is_silent else ())
        if any(isinstance(result, unasked) for result in results):
            await self.kill_all(sandbox_id)
        failures = [
            result
            for result in results
            if isinstance(result, BaseException) and not isinstance(result, unasked)
        ]
        for failure in failures[1:]:
            log.error('pod sandbox "%s": %s', sandbox_id, failure)
        if failures:
            raise failures[0]

    async def kill_all(self, sandbox_id: str) -> None:
        """Kill the containers of a pod that has no supervisor and gets none."""
        for container in self._inventory.members(sandbox_id):
            try:
                await self.kill(container)
            except (NodeAgentError, OSError) as error:
                log.error('container "%s": not killed: %s', container.id, error)

    async def kill(self, container: Container) -> None:
        """Kill what runs of a container without its supervisor; nothing does where its cgroup has gone."""
        with suppress(NotFound):
            await asyncio.to_thread(self._groups.of(container).kill)
