"""Blocking calls and shared work, under cancellation."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass
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


@dataclass(slots=True, eq=False)
class Flight(Generic[T]):
    """Work for a key. landed: the result of the first of the key's flights that succeeds."""

    key: Hashable
    owner: object
    task: "asyncio.Task[T]"
    landed: "asyncio.Future[T]"
    waiters: int = 0

    async def ended(
        self,
        *,
        until: "asyncio.Future[None] | None" = None,
        timeout_seconds: float | None = None,
    ) -> bool:
        """Whether it is over; returns before that if told so."""
        futures: list[asyncio.Future[Any]] = [self.task, self.landed]
        if until:
            futures.append(until)
        await asyncio.wait(futures, timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
        return self.landed.done() or self.task.done()

    def result(self) -> T:
        """That of the first which succeeded, else what this one raised."""
        if self.landed.done():
            return self.landed.result()
        if self.task.cancelled():
            raise Unavailable("cut off: the agent is ending")
        return self.task.result()


class Flights(Generic[T]):
    """Work that is shared by all who want the same; it ends when it is done, or when nobody waits for it any more.

    Several flights for a key are a race: the first that succeeds is the result of all, and the others end.
    """

    def __init__(self) -> None:
        self._flights: dict[Hashable, list[Flight[T]]] = {}
        self._leaving: set[asyncio.Task[T]] = set()

    def __len__(self) -> int:
        return len(self._flights)

    def of(self, key: Hashable) -> Sequence[Flight[T]]:
        """Those that are under way, the oldest first."""
        return self._flights.get(key, ())

    def start(self, key: Hashable, work: Coroutine[Any, Any, T], owner: object = None) -> Flight[T]:
        """Begin work for a key, beside others' for the same; the caller is to wait for it."""
        rivals = self._flights.setdefault(key, [])
        landed = rivals[0].landed if rivals else asyncio.get_running_loop().create_future()
        flight = Flight(key, owner, asyncio.create_task(work), landed)
        rivals.append(flight)
        flight.task.add_done_callback(lambda _task: self._landed(flight))
        return flight

    @asynccontextmanager
    async def awaited(self, flight: Flight[T]) -> AsyncIterator[None]:
        """It goes on while the block runs. The last who leaves ends it, and sees that nothing is left of it."""
        flight.waiters += 1
        try:
            yield
        finally:
            flight.waiters -= 1
            if not flight.waiters and not flight.task.done():
                self._forget(flight)
                self._leaving.add(flight.task)
                flight.task.cancel()
                await ended(flight.task)

    async def join(
        self, key: Hashable, make: Callable[[], Coroutine[Any, Any, T]], owner: object = None
    ) -> T:
        """The result of the work for `key`, which is started unless it goes on already.

        Where somebody else's attempt fails one's own follows: another owner's credentials and servers may be others.
        """
        flight = next(iter(self.of(key)), None) or self.start(key, make(), owner)
        async with self.awaited(flight):
            await flight.ended()
        try:
            return flight.result()
        except NodeAgentError:
            if flight.owner is owner:
                raise
        return await self.join(key, make, owner)

    async def close(self) -> None:
        """Cancel everything and see it end."""
        for flights in self._flights.values():
            for flight in flights:
                self._leaving.add(flight.task)
                flight.task.cancel()
        while self._leaving:
            await asyncio.wait(self._leaving)

    def _landed(self, flight: Flight[T]) -> None:
        self._forget(flight)
        self._leaving.discard(flight.task)
        if flight.task.cancelled() or flight.task.exception() or flight.landed.done():
            return
        flight.landed.set_result(flight.task.result())
        self._leaving.update(rival.task for rival in self._flights.pop(flight.key, ()))

    def _forget(self, flight: Flight[T]) -> None:
        flights = self._flights.get(flight.key, [])
        if flight in flights:
            flights.remove(flight)
        if not flights:
            self._flights.pop(flight.key, None)
