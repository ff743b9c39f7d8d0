"""Bounds that count what moves, and who makes room."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from nodeagent.images import turns
from nodeagent.images.turns import Permits, Turns


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "PRESS_SECONDS", 0.01)
    monkeypatch.setattr(turns, "PACE_SECONDS", 0.02)


class Work:
    """In a slot until it is told to leave, or asked to give way."""

    def __init__(self, owner: str, bytes_per_look: int = 0) -> None:
        self.owner = owner
        self.leave = asyncio.Event()
        self.begun = asyncio.Event()
        self.asked = 0
        self._position = 0
        self._bytes_per_look = bytes_per_look

    def position(self) -> int:
        self._position += self._bytes_per_look
        return self._position

    def give_way(self) -> None:
        self.asked += 1
        self.leave.set()

    async def run(self, bound: Turns) -> None:
        async with bound.taken(self.owner, self.position, self.give_way):
            self.begun.set()
            await self.leave.wait()


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_no_more_than_so_many() -> None:
    bound = Turns(2)
    async with bound.taken("a"), bound.taken("a"):
        third = asyncio.create_task(Work("b").run(bound))
        await asyncio.sleep(0.05)
        assert not third.done()
        third.cancel()
    async with bound.taken("a"), bound.taken("a"):
        pass


async def test_who_has_least_comes_first() -> None:
    bound = Turns(2)
    many, few = [Work("many") for _ in range(3)], Work("few")
    async with asyncio.TaskGroup() as group, bound.taken("many"):
        async with bound.taken("other"):
            for work in (*many, few):
                group.create_task(work.run(bound))
            await settled()
        await few.begun.wait()
        assert not any(work.begun.is_set() for work in many)
        for work in (few, *many):
            work.leave.set()


async def test_the_slowest_makes_room() -> None:
    bound = Turns(2)
    slow, fast, waiting = Work("a"), Work("a", 1 << 30), Work("b")
    async with asyncio.TaskGroup() as group:
        for work in (slow, fast, waiting):
            group.create_task(work.run(bound))
        async with asyncio.timeout(30):
            await waiting.begun.wait()
        assert (slow.asked, fast.asked) == (1, 0)
        for work in (fast, waiting):
            work.leave.set()


async def test_a_floor_rises_with_the_time_that_somebody_waits() -> None:
    """At first the pace is fast enough, by and by it is not."""
    bound = Turns(1)
    waiting = Work("b")

    class Steady(Work):
        def position(self) -> int:
            return int(asyncio.get_running_loop().time() * (turns.FLOOR_BYTES_PER_SECOND / 4))

    steady = Steady("a")
    async with asyncio.TaskGroup() as group:
        group.create_task(steady.run(bound))
        await steady.begun.wait()
        began = asyncio.get_running_loop().time()
        group.create_task(waiting.run(bound))
        async with asyncio.timeout(30):
            await waiting.begun.wait()
        assert asyncio.get_running_loop().time() - began >= 0.2
        assert steady.asked == 1
        waiting.leave.set()


async def test_grace() -> None:
    bound = Turns(1, grace_seconds=3600)
    holder, waiting = Work("a"), Work("b")
    async with asyncio.TaskGroup() as group:
        for work in (holder, waiting):
            group.create_task(work.run(bound))
        await asyncio.sleep(0.1)
        assert not holder.asked
        for work in (holder, waiting):
            work.leave.set()


async def test_who_stops_waiting_leaves_nothing() -> None:
    bound = Turns(1)
    async with bound.taken("a"):
        waiting = [asyncio.create_task(Work("b").run(bound)) for _ in range(3)]
        await settled()
        waiting[0].cancel()
        await settled()
    waiting[1].cancel()  # at the moment at which it has got it
    waiting[2].cancel()
    await asyncio.wait(waiting)
    async with bound.taken("a"):
        pass
    assert not bound._held
    assert bound._free == 1


def test_permits_go_round() -> None:
    """Threads that pass theirs on all get on, as many at a time as there are permits."""
    permits, lock, most, working = Permits(2), threading.Lock(), 0, 0

    def work() -> None:
        nonlocal most, working
        with permits:
            for _ in range(200):
                with lock:
                    working += 1
                    most = max(most, working)
                with lock:
                    working -= 1
                permits.pass_on()

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(work) for _ in range(8)]:
            done.result(timeout=60)
    assert most <= 2
    assert permits._free == 2


def test_the_longest_waiting_is_next() -> None:
    permits, order = Permits(1), list[int]()

    def work(number: int) -> None:
        with permits:
            order.append(number)

    with permits, ThreadPoolExecutor(3) as threads:
        for number in range(3):
            threads.submit(work, number)
            while len(permits._waiting) <= number:
                pass
        permits.pass_on()
        assert order == [0, 1, 2]
