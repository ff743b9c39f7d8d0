"""Creations that outlive their callers."""

import asyncio

import pytest

from nodeagent.errors import Unavailable
from nodeagent.lifecycle.creations import Creations, doing
from nodeagent.tasks import Caller, Tasks, caller


class Maker:
    """Makes ids when told to, and counts how often it was asked."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.asked = 0
        self.made: set[str] = set()

    async def __call__(self) -> str:
        self.asked += 1
        await self.go.wait()
        name = f"id-{self.asked}"
        self.made.add(name)
        return name


async def test_a_retry_joins_the_call_that_was_given_up() -> None:
    maker = Maker()
    creations = Creations(Tasks(), "creation", maker.made.__contains__)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await creations.join("key", "pod", maker)
    maker.go.set()
    assert await creations.join("key", "pod", maker) == "id-1"
    assert maker.asked == 1


async def test_a_result_that_reached_nobody_waits_for_the_retry() -> None:
    maker = Maker()
    creations = Creations(Tasks(), "creation", maker.made.__contains__)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await creations.join("key", "pod", maker)
    maker.go.set()
    await asyncio.sleep(0.01)
    assert await creations.join("key", "pod", maker) == "id-1"
    assert await creations.join("key", "pod", maker) == "id-2"


async def test_a_result_whose_caller_has_gone_waits_for_the_retry() -> None:
    """The call goes on to its end, as calls that change something do; nobody hears its answer."""
    maker, gone = Maker(), Caller()
    creations = Creations(Tasks(), "creation", maker.made.__contains__)
    caller.set(gone)
    call = asyncio.create_task(creations.join("key", "pod", maker))
    await asyncio.sleep(0)
    gone.has_gone = True
    maker.go.set()
    assert await call == "id-1"
    caller.set(Caller())
    assert await creations.join("key", "pod", maker) == "id-1"
    assert await creations.join("key", "pod", maker) == "id-2"


async def test_what_was_removed_meanwhile_is_made_anew() -> None:
    maker = Maker()
    creations = Creations(Tasks(), "creation", maker.made.__contains__)
    maker.go.set()
    task = asyncio.create_task(creations.join("key", "pod", maker))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0.01)
    maker.made.clear()
    assert await creations.join("key", "pod", maker) == "id-2"


async def test_a_failure_reaches_everybody_and_is_forgotten() -> None:
    async def fail() -> str:
        await asyncio.sleep(0.01)
        raise ValueError("broken")

    creations = Creations(Tasks(), "creation", lambda _: True)
    results = await asyncio.gather(
        *(creations.join("key", "pod", fail) for _ in range(2)), return_exceptions=True
    )
    assert [str(result) for result in results] == ["broken", "broken"]
    maker = Maker()
    maker.go.set()
    assert await creations.join("key", "pod", maker) == "id-1"


async def test_closing_tells_who_waits() -> None:
    creations = Creations(Tasks(), "creation", lambda _: True)
    waiting = asyncio.create_task(creations.join("key", "pod x", Maker()))
    await asyncio.sleep(0.01)
    await creations.close()
    with pytest.raises(Unavailable, match="pod x"):
        await waiting


async def test_a_slow_stage_is_named_to_the_caller_and_the_retry_joins() -> None:
    go, asked = asyncio.Event(), 0

    async def make() -> str:
        nonlocal asked
        asked += 1
        doing("waiting for the filesystem at /data")
        await go.wait()
        return "made"

    creations = Creations(Tasks(), "creation", lambda _: True, patience_s=0.01)
    for _ in range(2):
        with pytest.raises(TimeoutError) as raised:
            await creations.join("key", 'container "c"', make)
        assert str(raised.value) == (
            'container "c": not made within 0.01 s, it goes on, and a retry joins it: '
            "waiting for the filesystem at /data"
        )
    go.set()
    assert await creations.join("key", 'container "c"', make) == "made"
    assert asked == 1
    doing("nothing that anybody is told")


async def test_a_creation_gets_no_error_of_another_one() -> None:
    """One that has failed a moment before, of which nothing has been heard yet."""
    creations = Creations(Tasks(), "creation", {"id-1"}.__contains__)
    fails = asyncio.Event()

    async def fail() -> str:
        fails.set()
        raise Unavailable("absent")

    async def make() -> str:
        return "id-1"

    async def join_when_it_fails() -> str:
        await fails.wait()
        return await creations.join("two", "pod two", make)

    joining = asyncio.create_task(join_when_it_fails())
    await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="absent"):
        await creations.join("one", "pod one", fail)
    assert await joining == "id-1"
