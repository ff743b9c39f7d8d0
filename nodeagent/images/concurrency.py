"""Blocking calls and shared work, under cancellation."""

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from concurrent.futures import Executor
from typing import Any, Generic, TypeVar

from nodeagent.errors import NodeAgentError, Unavailable

T = TypeVar("T")


async def to_the_end(
    executor: Executor | None,
    call: Callable[[], T],
    *,
    on_cancel: Callable[[], None] = lambda: None,
) -> T:
    """A blocking call in a thread. A cancelled caller leaves only when it has ended, so that what it used can go.

    on_cancel: what makes the call end soon.
    """
    future = asyncio.get_running_loop().run_in_executor(executor, call)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        on_cancel()
        await ended(future)
        raise


async def ended(future: "asyncio.Future[Any]") -> None:
    """Wait until it has, however often the caller is cancelled meanwhile; its result is of no interest."""
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            continue
    if not future.cancelled():
        future.exception()


class _Flight(Generic[T]):
    def __init__(self, task: "asyncio.Task[T]", owner: object) -> None:
        self.task = task
        self.owner = owner
        self.waiters = 0


class Flights(Generic[T]):
    """At most one piece of work for a key; it ends when it is done, or when nobody waits for it any more."""

    def __init__(self) -> None:
        self._flights: dict[Hashable, _Flight[T]] = {}
        self._leaving: set[asyncio.Task[T]] = set()

    def __len__(self) -> int:
        return len(self._flights)

    async def join(
        self, key: Hashable, make: Callable[[], Coroutine[Any, Any, T]], owner: object = None
    ) -> T:
        """The result of the work for `key`, which is started unless it goes on already.

        Where somebody else's attempt fails one's own follows: another owner's credentials and servers may be others.
        """
        flight = self._flights.get(key) or self._start(key, make, owner)
        try:
            return await self._wait(key, flight)
        except NodeAgentError:
            if flight.owner is owner:
                raise
        return await self.join(key, make, owner)

    async def close(self) -> None:
        """Cancel everything and see it end."""
        for flight in list(self._flights.values()):
            flight.task.cancel()
        while tasks := {flight.task for flight in self._flights.values()} | self._leaving:
            await asyncio.wait(tasks)

    def _start(
        self, key: Hashable, make: Callable[[], Coroutine[Any, Any, T]], owner: object
    ) -> _Flight[T]:
        flight = _Flight(asyncio.create_task(make()), owner)
        self._flights[key] = flight
        flight.task.add_done_callback(lambda task: self._landed(key, flight, task))
        return flight

    async def _wait(self, key: Hashable, flight: _Flight[T]) -> T:
        flight.waiters += 1
        try:
            await asyncio.wait([flight.task])
        finally:
            flight.waiters -= 1
            if not flight.waiters and not flight.task.done():
                await self._leave(key, flight)
        if flight.task.cancelled():
            raise Unavailable("cut off: the agent is ending")
        return flight.task.result()

    async def _leave(self, key: Hashable, flight: _Flight[T]) -> None:
        """The last who waits for the work ends it, and sees that nothing is left of it."""
        self._forget(key, flight)
        self._leaving.add(flight.task)
        flight.task.cancel()
        await ended(flight.task)

    def _landed(self, key: Hashable, flight: _Flight[T], task: "asyncio.Task[T]") -> None:
        self._forget(key, flight)
        self._leaving.discard(task)
        if not task.cancelled():
            task.exception()

    def _forget(self, key: Hashable, flight: _Flight[T]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
