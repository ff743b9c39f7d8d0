"""Shared work, with callers that give up."""

from __future__ import annotations

import asyncio

import pytest

from nodeagent.errors import NotFound, Unavailable
from nodeagent.images.concurrency import SharedWork
from nodeagent.tasks import Tasks


class Work:
    """Something that takes until it is told, and counts."""

    def __init__(self) -> None:
        self.begun = 0
        self.cancelled = 0
        self.go = asyncio.Event()
        self.error: Exception | None = None

    async def run(self) -> int:
        self.begun += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error:
            raise self.error
        return self.begun


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_one_flight_for_all() -> None:
    shared: SharedWork[int] = SharedWork(Tasks(), "work")
    work = Work()
    callers = [asyncio.create_task(shared.join("key", work.run)) for _ in range(3)]
    await settled()
    work.go.set()
    assert await asyncio.gather(*callers) == [1, 1, 1]
    assert len(shared) == 0
    assert await shared.join("key", work.run) == 2


async def test_keys_are_apart() -> None:
    shared: SharedWork[int] = SharedWork(Tasks(), "work")
    work = Work()
    work.go.set()
    assert {await shared.join(key, work.run) for key in "ab"} == {1, 2}


async def test_the_last_who_leaves_ends_it() -> None:
    shared: SharedWork[int] = SharedWork(Tasks(), "work")
    work = Work()
    callers = [asyncio.create_task(shared.join("key", work.run)) for _ in range(2)]
    await settled()
    callers[0].cancel()
    await settled()
    assert (callers[0].cancelled(), work.cancelled) == (True, 0)
    callers[1].cancel()
    await asyncio.wait(callers)
    assert (callers[1].cancelled(), work.cancelled, len(shared)) == (True, 1, 0)


async def test_a_failure_is_shared_by_one_owner() -> None:
    shared: SharedWork[int] = SharedWork(Tasks(), "work")
    work = Work()
    work.error = NotFound("no")
    callers = [asyncio.create_task(shared.join("key", work.run, owner=work)) for _ in range(2)]
    await settled()
    work.go.set()
    results = await asyncio.gather(*callers, return_exceptions=True)
    assert results == [work.error, work.error]
    assert work.begun == 1


async def test_another_owner_tries_again() -> None:
    shared: SharedWork[int] = SharedWork(Tasks(), "work")
    bad, good = Work(), Work()
    bad.error = NotFound("no")
    first = asyncio.create_task(shared.join("key", bad.run, owner=bad))
    await settled()
    second = asyncio.create_task(shared.join("key", good.run, owner=good))
    await settled()
    assert good.begun == 0
    bad.go.set()
    good.go.set()
    with pytest.raises(NotFound):
        await first
    assert await second == 1


async def race(shared: SharedWork[int], *works: Work) -> list[asyncio.Task[int]]:
    """Each work's owner waits for its own attempt."""

    async def fly(work: Work) -> int:
        attempt = shared.start("key", work.run(), owner=work)
        async with shared.awaited(attempt):
            await attempt.ended()
        return attempt.result()

    tasks = [asyncio.create_task(fly(work)) for work in works]
    await settled()
    return tasks


async def test_the_first_of_several_is_the_result_of_all() -> None:
    shared: SharedWork[int] = SharedWork(Tasks(), "work")
    slow, fast = Work(), Work()
    fast.begun = 6
    tasks = await race(shared, slow, fast)
    assert [attempt.owner for attempt in shared.of("key")] == [slow, fast]
    fast.go.set()
    assert await asyncio.gather(*tasks) == [7, 7]
    assert (slow.cancelled, fast.cancelled, len(shared)) == (1, 0, 0)


async def test_a_failure_ends_no_other_flight() -> None:
    shared: SharedWork[int] = SharedWork(Tasks(), "work")
    bad, good = Work(), Work()
    bad.error = NotFound("no")
    tasks = await race(shared, bad, good)
    bad.go.set()
    await asyncio.wait([tasks[0]])
    assert isinstance(tasks[0].exception(), NotFound)
    assert good.cancelled == 0
    good.go.set()
    assert await tasks[1] == 1


async def test_two_that_land_at_once() -> None:
    shared: SharedWork[int] = SharedWork(Tasks(), "work")
    works = Work(), Work()
    tasks = await race(shared, *works)
    for work in works:
        work.go.set()
    assert await asyncio.gather(*tasks) == [1, 1]
    await shared.close()
    assert len(shared) == 0


async def test_waiting_ends_as_told() -> None:
    shared: SharedWork[int] = SharedWork(Tasks(), "work")
    work = Work()
    attempt = shared.start("key", work.run())
    async with shared.awaited(attempt):
        told = asyncio.get_running_loop().create_future()
        told.set_result(None)
        assert not await attempt.ended(until=told)
        assert not await attempt.ended(timeout_seconds=0)
        work.go.set()
        assert await attempt.ended()


async def test_closing_ends_all() -> None:
    shared: SharedWork[int] = SharedWork(Tasks(), "work")
    work = Work()
    caller = asyncio.create_task(shared.join("key", work.run))
    await settled()
    await shared.close()
    assert work.cancelled == 1
    with pytest.raises(Unavailable):
        await caller
