"""The owner of background tasks: nothing ends unheard, nothing outlives it."""

import asyncio
import threading
from collections.abc import Callable
from itertools import pairwise

import pytest

from nodeagent import tasks as module
from nodeagent.errors import Unavailable
from nodeagent.tasks import Tasks, cancel, ended, pauses, to_the_end
from tests.support.faults import any_error


class World:
    """Tasks, and time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.paused: list[float] = []
        self.tasks = Tasks(sleep=self._sleep, clock=lambda: self.now)

    async def _sleep(self, seconds: float) -> None:
        self.paused.append(seconds)
        await asyncio.sleep(0)

    @property
    def counts(self) -> dict[str, int]:
        return {name: failure.count for name, failure in self.tasks.failures.by_name.items()}


@pytest.fixture
def world() -> World:
    return World()


async def settle() -> None:
    """Everything that has nothing to wait for happens."""
    for _ in range(20):
        await asyncio.sleep(0)


def failing(times: int, error: Callable[[], Exception]) -> Callable[[], module.Work[None]]:
    """Work that fails so many times, and returns the next time."""
    left = times

    async def work() -> None:
        nonlocal left
        if left:
            left -= 1
            raise error()

    return work


async def wait_for_ever() -> None:
    await asyncio.Event().wait()


# --- keepers ---


@any_error
async def test_a_keeper_goes_on_after_a_failure(
    world: World, error: Callable[[], Exception], caplog: pytest.LogCaptureFixture
) -> None:
    async with world.tasks as tasks:
        await tasks.keep("work", failing(1, error), about="a thing")
    failure = tasks.failures.by_name["work"]
    assert (failure.count, failure.last_error.partition(":")[0]) == (1, type(error()).__name__)
    assert failure.last_at_ns
    (record,) = caplog.records
    assert record.getMessage() == f"a thing: work: {failure.last_error}; started again in 0.1 s"
    assert record.exc_info is not None


async def test_a_keeper_that_always_fails_is_said_once_and_counted(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async with world.tasks as tasks:
        await tasks.keep("work", failing(20, lambda: KeyError("id")), longest_pause_seconds=5)
    assert world.counts == {"work": 20}
    assert len(caplog.records) == 1
    assert (world.paused[0], world.paused[-1]) == (0.1, 5)
    assert all(a == b == 5 or b == 2 * a or b == 5 for a, b in pairwise(world.paused))


async def test_a_failure_that_comes_back_after_some_time_is_said_again(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async with world.tasks as tasks:
        for seconds in (1, module.REPEAT_SECONDS + 1, 0):
            tasks.run("work", failing(1, lambda: KeyError("id"))(), about="a")
            await settle()
            world.now += seconds
    assert len(caplog.records) == 2


async def test_the_pauses_begin_anew_after_a_long_run(world: World) -> None:
    async def work() -> None:
        if len(world.paused) == 3:
            world.now += 1000
        if len(world.paused) < 5:
            raise KeyError("id")

    async with world.tasks as tasks:
        await tasks.keep("work", work)
    assert world.paused == [0.1, 0.2, 0.4, 0.1, 0.2]


async def test_what_is_foreseen_has_no_traceback(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async with world.tasks as tasks:
        await tasks.keep("work", failing(1, lambda: Unavailable("not now")))
    (record,) = caplog.records
    assert record.getMessage() == "work: not now; started again in 0.1 s"
    assert record.exc_info is None


async def test_a_keeper_survives_the_end_of_what_it_waits_for(world: World) -> None:
    """A cancellation that is not its own is a failure like any other."""
    waited_for = asyncio.create_task(wait_for_ever())
    began = 0

    async def work() -> None:
        nonlocal began
        began += 1
        if began == 1:
            await waited_for

    async with world.tasks as tasks:
        keeper = tasks.keep("work", work)
        await settle()
        waited_for.cancel()
        await keeper
    assert world.counts == {"work": 1}


async def test_a_keeper_ends_though_its_undo_fails(world: World) -> None:
    async def work() -> None:
        try:
            await wait_for_ever()
        finally:
            raise KeyError("id")

    async with world.tasks as tasks:
        keeper = tasks.keep("work", work)
        await settle()
    assert keeper.cancelled()
    assert world.counts == {"work": 1}


async def test_one_error_of_a_group_is_told_by_its_own_name(world: World) -> None:
    async def work() -> None:
        async with asyncio.TaskGroup():
            raise KeyError("id")

    async with world.tasks as tasks:
        tasks.run("work", work())
        await settle()
    assert tasks.failures.by_name["work"].last_error == "KeyError: 'id'"


def test_pauses_grow_to_a_bound() -> None:
    between = pauses()
    taken = [next(between) for _ in range(20)]
    assert taken == sorted(taken)
    assert (taken[0], taken[-1]) == (0.1, 30.0)
    assert next(pauses(0.01)) == 0.01


# --- work that nobody waits for, and work that somebody waits for ---


@any_error
async def test_what_nobody_waits_for_fails_into_the_log(
    world: World, error: Callable[[], Exception], caplog: pytest.LogCaptureFixture
) -> None:
    async with world.tasks as tasks:
        tasks.run("good", asyncio.sleep(0))
        tasks.run("work", failing(1, error)(), about="a thing")
        await settle()
    assert world.counts == {"good": 0, "work": 1}
    assert [m.partition(": ")[0] for m in caplog.messages] == ["a thing"]
    assert caplog.records[0].exc_info is not None


async def test_work_is_heard_that_ends_because_something_else_was_cancelled(world: World) -> None:
    waited_for = asyncio.create_task(wait_for_ever())

    async def work() -> None:
        await waited_for

    async with world.tasks as tasks:
        tasks.run("work", work())
        tasks.run("told", wait_for_ever()).cancel()
        await settle()
        waited_for.cancel()
        await settle()
    assert world.counts == {"work": 1, "told": 0}


async def test_what_somebody_waits_for_fails_into_them(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async def answer() -> int:
        return 5

    async with world.tasks as tasks:
        assert await tasks.start("work", answer()) == 5
        with pytest.raises(KeyError):
            await tasks.start("work", failing(1, lambda: KeyError("id"))())
    assert (world.counts, caplog.messages) == ({}, [])


async def test_what_is_waited_for_no_more_is_heard(world: World) -> None:
    go = asyncio.Event()

    async def work() -> None:
        await go.wait()
        raise KeyError("id")

    async with world.tasks as tasks:
        tasks.let_go(tasks.start("work", work(), about="a thing"))
        go.set()
        await settle()
    assert world.counts == {"work": 1}


# --- the end ---


async def test_nothing_outlives_its_owner(world: World) -> None:
    undone: list[str] = []

    async def work(name: str) -> None:
        try:
            await wait_for_ever()
        finally:
            await asyncio.sleep(0)
            undone.append(name)

    async with world.tasks as tasks:
        tasks.run("run", work("run"))
        tasks.part().part().keep("keep", lambda: work("keep"))
        with pytest.raises(asyncio.CancelledError):
            await _left(tasks, work("start"))
    assert sorted(undone) == ["keep", "run", "start"]
    assert set(world.counts.values()) == {0}


async def _left(tasks: Tasks, work: module.Work[None]) -> None:
    """Start work, and be cancelled while it is waited for."""
    waiting = asyncio.create_task(_await(tasks.start("start", work)))
    await settle()
    await cancel(waiting)
    await waiting


async def _await(task: asyncio.Task[None]) -> None:
    await asyncio.shield(task)


async def test_an_undo_that_fails_at_the_end_is_heard(world: World) -> None:
    async def work() -> None:
        try:
            await wait_for_ever()
        finally:
            raise KeyError("id")

    task = world.tasks.start("work", work())
    await settle()
    await world.tasks.close()
    assert task.done()
    assert world.counts == {"work": 1}


async def test_parts_end_first_and_alone(world: World) -> None:
    part = world.tasks.part()
    theirs, ours = part.keep("theirs", wait_for_ever), world.tasks.keep("ours", wait_for_ever)
    await part.close()
    assert (theirs.done(), ours.done()) == (True, False)
    await world.tasks.close()
    assert ours.done()


async def test_what_is_started_after_the_end_does_not_run(world: World) -> None:
    await world.tasks.close()
    with pytest.raises(asyncio.CancelledError):
        await world.tasks.run("late", failing(1, lambda: KeyError("id"))())
    assert world.counts == {"late": 0}


async def test_who_closes_may_be_cancelled_and_waits_all_the_same(world: World) -> None:
    go = asyncio.Event()

    async def work() -> None:
        try:
            await wait_for_ever()
        finally:
            await go.wait()

    held = world.tasks.part().start("work", work())
    other = world.tasks.part().start("work", wait_for_ever())
    task = world.tasks.start("work", wait_for_ever())
    await settle()
    closing = asyncio.create_task(world.tasks.close())
    await settle()
    closing.cancel()
    await settle()
    assert not closing.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert all(task.done() for task in (held, other, task))


async def test_settled_waits_for_so_long(world: World) -> None:
    await world.tasks.settled(60)
    tasks = [world.tasks.start("work", asyncio.sleep(0))]
    await world.tasks.settled(60)
    tasks.append(world.tasks.start("work", wait_for_ever()))
    await world.tasks.settled(0)
    assert [task.done() for task in tasks] == [True, False]
    await world.tasks.close()


# --- threads ---


async def test_a_call_in_a_thread_is_waited_for() -> None:
    stop, has_ended = threading.Event(), threading.Event()

    def call() -> None:
        stop.wait(5)
        has_ended.set()

    task = asyncio.create_task(to_the_end(None, call, on_cancel=stop.set))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert has_ended.is_set()


async def test_results_and_errors_of_a_thread() -> None:
    assert await to_the_end(None, lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        await to_the_end(None, lambda: 1 // 0)


async def test_ended_is_told_of_what_has_ended_already() -> None:
    task = asyncio.create_task(asyncio.sleep(0))
    await task
    await ended([task])
    await ended([])
