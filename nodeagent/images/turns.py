"""Bounds on what the pulls of a node do at once, which slow servers cannot occupy.

Registries decide how fast a layer comes, so a bound must not count layers, but those that make progress. `Turns` bounds
what waiting takes (connections, threads, buffers): the slowest gives way to those that wait. `Permits` bounds threads
that work: one that waits for bytes has none.
"""

import asyncio
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass

PRESS_SECONDS = 1.0  # between two checks of work that waits
PACE_SECONDS = 2.0  # over at least so long a time is pace measured
FLOOR_BYTES_PER_SECOND = 64 << 10  # for each second that somebody waits


class _Holder:
    """Work that has a turn. position: the number of bytes that it has done; give_way: asks it to leave."""

    def __init__(self, position: Callable[[], int], give_way: Callable[[], None]) -> None:
        self.give_way = give_way
        self.taken_at = _now()
        self.asked = False
        self._position = position
        self._marks = deque([(self.taken_at, position())], maxlen=2)

    def bytes_per_second(self, now: float) -> float:
        """The pace over at least the last PACE_SECONDS."""
        since, start = self._marks[0]
        position = self._position()
        if now - self._marks[-1][0] > PACE_SECONDS:
            self._marks.append((now, position))
        return (position - start) / max(now - since, 0.001)


@dataclass(slots=True, eq=False)
class _Waiter:
    owner: Hashable
    turn: "asyncio.Future[None]"


class Turns:
    """A number of turns for work; owners that have the fewest come first.

    Work that waits asks the slowest to give way, if its pace is below a floor that rises with the time of waiting.
    grace: the number of seconds for which work is not asked to.
    """

    def __init__(self, count: int, grace_seconds: float = 0.0) -> None:
        self._free = count
        self._grace_seconds = grace_seconds
        self._held: Counter[Hashable] = Counter()
        self._holders: set[_Holder] = set()
        self._waiting: list[_Waiter] = []

    @asynccontextmanager
    async def taken(
        self,
        owner: Hashable,
        position: Callable[[], int] | None = None,
        give_way: Callable[[], None] | None = None,
    ) -> AsyncIterator[None]:
        """Have a turn while the block runs. Work without `position` and `give_way` is never asked to leave."""
        await self._turn(owner)
        holder = None
        if position and give_way:
            holder = _Holder(position, give_way)
            self._holders.add(holder)
        try:
            yield
        finally:
            if holder:
                self._holders.discard(holder)
            self._release(owner)

    async def _turn(self, owner: Hashable) -> None:
        waiter = _Waiter(owner, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        self._grant()
        began = _now()
        try:
            while not waiter.turn.done():
                await asyncio.wait([waiter.turn], timeout=PRESS_SECONDS)
                if not waiter.turn.done():
                    self._press(_now() - began)
        except asyncio.CancelledError:
            if waiter.turn.done():  # granted in the same turn of the loop in which it was cancelled
                self._release(owner)
            else:
                self._waiting.remove(waiter)
            raise

    def _grant(self) -> None:
        while self._free and self._waiting:
            waiter = min(self._waiting, key=lambda waiting: self._held[waiting.owner])
            self._waiting.remove(waiter)
            self._held[waiter.owner] += 1
            self._free -= 1
            waiter.turn.set_result(None)

    def _release(self, owner: Hashable) -> None:
        self._free += 1
        self._held[owner] -= 1
        if not self._held[owner]:
            del self._held[owner]
        self._grant()

    def _press(self, waited_seconds: float) -> None:
        """Ask the slowest to give way, unless all are faster than the floor for this time of waiting."""
        now = _now()
        paces = {
            holder: holder.bytes_per_second(now)
            for holder in self._holders
            if not holder.asked and now - holder.taken_at >= self._grace_seconds
        }
        slowest = min(paces, key=paces.__getitem__, default=None)
        if slowest and paces[slowest] < waited_seconds * FLOOR_BYTES_PER_SECOND:
            slowest.asked = True
            slowest.give_way()


class Permits:
    """A number of permits for threads to work. Each goes to the thread that has waited longest."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._lock = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()

    def acquire(self) -> None:
        turn = (
            threading.Lock()
        )  # held by the waiting thread itself, and released by the one that passes the permit on
        with self._lock:
            if self._free:
                self._free -= 1
                return
            turn.acquire()
            self._waiting.append(turn)
        turn.acquire()

    def release(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._free += 1

    def pass_on(self) -> None:
        """Let waiting threads work first, then go on."""
        if self._waiting:
            self.release()
            self.acquire()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def _now() -> float:
    return asyncio.get_running_loop().time()
