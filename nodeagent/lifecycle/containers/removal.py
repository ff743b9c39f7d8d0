"""What there is of a container is removed, then its record: whether it was removed, or its creation is undone.

Each step is done whatever became of the others, and can be done again. The record goes last, and only if nothing is
left, as it is found by the record. What cannot be undone at once is tried again in the background, then at the next
start.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any

from nodeagent.errors import NodeAgentError
from nodeagent.images.catalog import Images
from nodeagent.lifecycle.containers import unkillable
from nodeagent.lifecycle.containers.directories import Directories
from nodeagent.lifecycle.containers.groups import Groups
from nodeagent.lifecycle.inventory import Inventory
from nodeagent.records import Container
from nodeagent.tasks import Tasks

log = logging.getLogger(__name__)

# Whoever waits for an undo waits no longer; an agent that ends has a few seconds more.
UNDO_SECONDS = 10.0
NAME = "undo"


class Removal:
    """Removes containers that do not run, finished or not."""

    def __init__(
        self,
        inventory: Inventory,
        groups: Groups,
        images: Images,
        directories: Directories,
        tasks: Tasks,
    ) -> None:
        self._inventory = inventory
        self._groups = groups
        self._images = images
        self._directories = directories
        self._tasks = tasks.part()
        self._undoing: dict[str, str] = {}

    async def clear(self, container: Container) -> None:
        """Remove all there is, and the record. Raises the first error, with the record kept."""
        errors: list[Exception] = []
        for step in (
            partial(self._leave_supervisor, container),
            partial(self._groups.remove, container),
            partial(self._take, container),
            partial(self._release, container),
        ):
            await _guarded(step, errors)
        for error in errors[1:]:
            log.error('container "%s": cannot be removed yet: %s', container.id, error)
        if errors:
            raise errors[0]
        self._inventory.forget(container)

    async def undo(self, container: Container) -> None:
        """Undo a creation; returns when that is done, or goes on behind the caller, who has waited long enough."""
        about = f'container "{container.id}"'
        self._undoing[container.id] = "it has just begun"
        await undone(self._tasks, about, partial(self._undo, container))

    def why_left(self, container_id: str) -> str | None:
        """Why a creation is still being undone; None where it is not."""
        return self._undoing.get(container_id)

    async def _undo(self, container: Container) -> None:
        if container.id in self._inventory.containers:
            try:
                await self.clear(container)
            except Exception as error:
                self._undoing[container.id] = str(error) or repr(error)
                raise
        self._undoing.pop(container.id, None)

    async def close(self) -> None:
        """Leave what cannot be undone yet to the next start."""
        await self._tasks.close()

    async def _leave_supervisor(self, container: Container) -> None:
        pod = self._inventory.pods.get(container.sandbox_id)
        if pod is not None and pod.supervisor is not None:
            self._inventory.write_noted((container,))  # it keeps the exit code until then
            with unkillable.named((container,), self._groups):
                await pod.supervisor.remove(container.id)

    async def _take(self, container: Container) -> None:
        await self._directories.take(container.id)

    async def _release(self, container: Container) -> None:
        await self._images.release(container.id)


async def undone(tasks: Tasks, about: str, undo: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Undo something until that succeeds; returns after the first attempt, and after UNDO_SECONDS in any case."""
    is_undone, tried = False, asyncio.Event()

    async def attempt() -> None:
        nonlocal is_undone
        try:
            await undo()
            is_undone = True
        finally:
            tried.set()

    tasks.keep(NAME, attempt, about=about)
    with suppress(TimeoutError):
        async with asyncio.timeout(UNDO_SECONDS):
            await tried.wait()
    if not is_undone:
        log.warning("%s: its creation cannot be undone yet, which goes on", about)


async def _guarded(step: Callable[[], Awaitable[None]], errors: list[Exception]) -> None:
    try:
        await step()
    except (NodeAgentError, OSError) as error:
        errors.append(error)
