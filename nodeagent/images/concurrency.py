"""Shared work, under cancellation."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from nodeagent.errors import NodeAgentError, Unavailable
from nodeagent.tasks import Tasks, cancel

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Attempt(Generic[T]):
    """One attempt at the work for a key. success: the result of the key's first attempt that succeeds."""

    key: Hashable
    owner: object
    task: "asyncio.Task[T]"
    success: "asyncio.Future[T]"
    waiters: int = 0

    async def ended(
        self,
        *,
        until: "asyncio.Future[None] | None" = None,
        timeout_seconds: float | None = None,
    ) -> bool:
        """Wait for the end and return whether it is there; `until` or the time limit end the waiting."""
        futures: list[asyncio.Future[Any]] = [self.task, self.success]
        if until:
            futures.append(until)
        await asyncio.wait(futures, timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
        return self.success.done() or self.task.done()

    def result(self) -> T:
        """The result of the first attempt that succeeded, else raise the error of this one."""
        if self.success.done():
            return self.success.result()
        if self.task.cancelled():
            raise Unavailable("interrupted: the agent is ending")
        return self.task.result()


class SharedWork(Generic[T]):
    """Work that all callers with the same key share; it is cancelled when the last of them has left.

    A pull that nobody waits for would go on to use the network and the disk, and loses nothing when it is cut off: the
    kubelet asks again. `lifecycle.creations` has the opposite rule, for what a retry must find as it was left.

    Several attempts for a key are a race: the first that succeeds is the result of all, and the others end.
    name: of the tasks that do it.
    """

    def __init__(self, tasks: Tasks, name: str) -> None:
        self._tasks = tasks
        self._name = name
        self._attempts: dict[Hashable, list[Attempt[T]]] = {}
        self._leaving: set[asyncio.Task[T]] = set()

    def __len__(self) -> int:
        return len(self._attempts)

    def of(self, key: Hashable) -> Sequence[Attempt[T]]:
        """The attempts that are under way, the oldest first."""
        return self._attempts.get(key, ())

    def start(
        self, key: Hashable, work: Coroutine[Any, Any, T], owner: object = None
    ) -> Attempt[T]:
        """Begin an attempt, beside others for the same key; the caller must wait for it."""
        rivals = self._attempts.setdefault(key, [])
        success = rivals[0].success if rivals else asyncio.get_running_loop().create_future()
        attempt = Attempt(key, owner, self._tasks.start(self._name, work), success)
        rivals.append(attempt)
        attempt.task.add_done_callback(lambda _task: self._settle(attempt))
        return attempt

    @asynccontextmanager
    async def awaited(self, attempt: Attempt[T]) -> AsyncIterator[None]:
        """Keep an attempt going while the block runs. The last caller that leaves cancels it and waits for its end."""
        attempt.waiters += 1
        try:
            yield
        finally:
            attempt.waiters -= 1
            if not attempt.waiters and not attempt.task.done():
                # Forgotten first: no new caller may join an attempt that is being cancelled.
                self._forget(attempt)
                self._leaving.add(attempt.task)
                await cancel(attempt.task)

    async def join(
        self, key: Hashable, make: Callable[[], Coroutine[Any, Any, T]], owner: object = None
    ) -> T:
        """Return the result of the work for `key`, which is started unless it is under way already.

        Where the attempt of another owner fails, one of this owner follows, with its own credentials and servers.
        """
        attempt = next(iter(self.of(key)), None) or self.start(key, make(), owner)
        async with self.awaited(attempt):
            await attempt.ended()
        try:
            return attempt.result()
        except NodeAgentError:
            if attempt.owner is owner:
                raise
        return await self.join(key, make, owner)

    async def close(self) -> None:
        """Cancel everything and wait for its end."""
        for attempts in self._attempts.values():
            for attempt in attempts:
                self._leaving.add(attempt.task)
                attempt.task.cancel()
        while self._leaving:
            await asyncio.wait(self._leaving)

    def _settle(self, attempt: Attempt[T]) -> None:
        self._forget(attempt)
        self._leaving.discard(attempt.task)
        if attempt.task.cancelled() or attempt.task.exception() or attempt.success.done():
            return
        attempt.success.set_result(attempt.task.result())
        self._leaving.update(rival.task for rival in self._attempts.pop(attempt.key, ()))

    def _forget(self, attempt: Attempt[T]) -> None:
        attempts = self._attempts.get(attempt.key, [])
        if attempt in attempts:
            attempts.remove(attempt)
        if not attempts:
            self._attempts.pop(attempt.key, None)
