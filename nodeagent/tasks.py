"""Background tasks and their owner: none runs without one, and none fails unheard.

`Tasks` makes every task of the agent that is not in an `asyncio.TaskGroup`; a lint and a test hold it. There are three
kinds. A keeper (`keep`) is restarted after a failure, until it returns. The failure of work that nobody waits for
(`run`) is logged and counted. That of work that somebody waits for (`start`) is raised to whoever awaits it.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import AsyncExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from nodeagent.errors import NodeAgentError

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 30.0
# A failure that comes again within this time, with the same text, is only counted.
REPEAT_SECONDS = 60.0
NOT_ITS_OWN = "something that the task waited for was cancelled, not the task"

T = TypeVar("T")
Work = Coroutine[Any, Any, T]


@dataclass(slots=True)
class Caller:
    """Whoever waits for the result of a task that goes on without him."""

    has_gone: bool = False


caller: ContextVar[Caller] = ContextVar("caller", default=Caller())  # noqa: B039 nobody changes the default
"""The one for whom a task works; tasks that it starts work for him as well."""


@dataclass(slots=True)
class Failure:
    """How often tasks of one name have failed since the agent started, and how the last of them did.

    last_error: "" and last_at_ns: 0 before the first one. last_at_ns: Unix time.
    """

    count: int = 0
    last_error: str = ""
    last_at_ns: int = 0


class Failures:
    """The failures of background tasks by the tasks' names, of which there are few: they label a metric."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._said: dict[tuple[str, str], tuple[str, float]] = {}
        self.by_name: dict[str, Failure] = {}

    def expect(self, name: str) -> None:
        """Count from zero: a rate over time sees the first failure only where there was a zero before it."""
        self.by_name.setdefault(name, Failure())

    def note(self, name: str, error: BaseException, about: str = "", then: str = "") -> None:
        """Count a failure, and log it unless it repeats the one before.

        about: the object that the task works on. then: what follows the failure, for the log.
        """
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        self.expect(name)
        failure = self.by_name[name]
        failure.count += 1
        failure.last_error = f"{type(error).__name__}: {error}"
        failure.last_at_ns = time.time_ns()
        if self._is_new(name, about, failure.last_error):
            is_expected = isinstance(error, NodeAgentError | TimeoutError)
            log.error(
                "%s: %s%s",
                _what(name, about),
                str(error) if is_expected else failure.last_error,
                then,
                exc_info=None if is_expected else error,
            )

    def _is_new(self, name: str, about: str, text: str) -> bool:
        now = self._clock()
        self._said = {
            key: (said, at) for key, (said, at) in self._said.items() if now - at < REPEAT_SECONDS
        }
        said, _ = self._said.get((name, about), ("", now))
        self._said[name, about] = text, now
        return said != text


@dataclass(slots=True)
class _Running:
    """A task that runs. is_heard: its failure is logged and counted, because nobody waits for it."""

    name: str
    about: str
    is_heard: bool = False


class Tasks:
    """The owner of background tasks; on leaving it, they have ended.

    failures: shared with its parts. sleep and clock: asyncio.sleep and time.monotonic, except in tests.
    """

    def __init__(
        self,
        *,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.failures = Failures(clock)
        self._sleep = sleep
        self._clock = clock
        self._running: dict[asyncio.Task[Any], _Running] = {}
        self._parts: list[Tasks] = []
        self._is_closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    def part(self) -> "Tasks":
        """An owner that can be closed before this one; this one closes it otherwise."""
        part = Tasks(sleep=self._sleep, clock=self._clock)
        part.failures = self.failures
        self._parts.append(part)
        return part

    def keep(
        self,
        name: str,
        factory: Callable[[], Work[None]],
        *,
        about: str = "",
        longest_pause_seconds: float = LONGEST_PAUSE_SECONDS,
    ) -> asyncio.Task[None]:
        """Run what `factory` gives until it returns; after each failure anew, with pauses that grow to the longest.

        After a run that has lasted longer than the longest pause, the pauses begin with the shortest again.
        """
        self.failures.expect(name)
        keeping = self._keep(name, factory, about, longest_pause_seconds)
        task = self.start(name, keeping, about=about)
        task.set_name(_what(name, about))
        return task

    def run(self, name: str, work: Work[None], *, about: str = "") -> asyncio.Task[None]:
        """Do work that nobody waits for; its failure is logged and counted."""
        self.failures.expect(name)
        task = self.start(name, work, about=about)
        self.let_go(task)
        return task

    def start(self, name: str, work: Work[T], *, about: str = "") -> asyncio.Task[T]:
        """Do work whose result, or failure, the caller takes. After `close` it is cancelled at once."""
        task = asyncio.get_running_loop().create_task(work, name=about or name)
        self._running[task] = _Running(name, about)
        task.add_done_callback(self._ended)
        if self._is_closed:
            task.cancel()
        return task

    def let_go(self, task: asyncio.Task[Any]) -> None:
        """Wait no more for work that was started and has not ended: from now on its failure is logged and counted."""
        self._running[task].is_heard = True

    async def settled(self, seconds: float) -> None:
        """Return when nothing runs any more, and after this time in any case."""
        if self._running:
            await asyncio.wait(self._running, timeout=seconds)

    async def close(self) -> None:
        """Cancel everything and wait until it has ended, the parts first. A failure meanwhile is logged and counted."""
        async with (
            AsyncExitStack() as ends
        ):  # each is waited for, also if the caller is cancelled meanwhile
            ends.push_async_callback(self._end)
            for part in self._parts:
                ends.push_async_callback(part.close)

    async def _end(self) -> None:
        self._is_closed = True
        for task in self._running:
            if not task.done():
                self.let_go(task)
                task.cancel()
        await ended(self._running)  # with what they start meanwhile

    def _ended(self, task: asyncio.Task[Any]) -> None:
        running = self._running.pop(task)
        if not running.is_heard:
            return
        error: BaseException | None = None
        if not task.cancelled():
            error = task.exception()
        elif not task.cancelling():
            error = asyncio.CancelledError(NOT_ITS_OWN)
        if error is not None:
            self.failures.note(running.name, error, running.about)

    async def _keep(
        self, name: str, factory: Callable[[], Work[None]], about: str, longest_s: float
    ) -> None:
        failure: BaseException
        between = pauses(longest_s)
        while True:
            began = self._clock()
            try:
                return await factory()
            except asyncio.CancelledError:
                if _is_cancelled():
                    raise
                failure = asyncio.CancelledError(NOT_ITS_OWN)
            except Exception as error:  # noqa: BLE001 whatever it is, the keeper goes on
                failure = error
            if self._clock() - began > longest_s:
                between = pauses(longest_s)
            pause = next(between)
            self.failures.note(name, failure, about, f"; started again in {pause:g} s")
            if (
                _is_cancelled()
            ):  # an undo has failed, and its error took the place of the cancellation
                raise asyncio.CancelledError
            await self._sleep(pause)


def _what(name: str, about: str) -> str:
    return f"{about}: {name}" if about else name


def _is_cancelled() -> bool:
    """Whether somebody cancels the running task itself, not something that it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def pauses(longest_seconds: float = LONGEST_PAUSE_SECONDS) -> Iterator[float]:
    """Seconds to wait before each further attempt: twice as long each time, up to a bound, without an end."""
    pause = FIRST_PAUSE_SECONDS
    while True:
        pause = min(pause, longest_seconds)
        yield pause
        pause *= 2


async def all_of(work: Iterable[Work[T]]) -> list[T]:
    """Do work side by side, and return the results in order.

    When one fails, the others are cancelled and waited for, and its error is raised as it is, not in a group.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await ended(tasks)


async def ended(futures: Collection[asyncio.Future[Any]]) -> None:
    """Wait until all have ended, however often the caller is cancelled meanwhile: that is raised afterwards."""
    cancelled: asyncio.CancelledError | None = None
    while running := [future for future in futures if not future.done()]:
        try:
            await asyncio.wait(running)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


async def to_the_end(
    executor: Executor | None,
    call: Callable[[], T],
    *,
    on_cancel: Callable[[], None] = lambda: None,
) -> T:
    """A blocking call in a thread. A cancelled caller leaves only when it has ended, so that what it used can go.

    executor: None is the event loop's own. on_cancel: what makes the call end soon.
    """
    future = asyncio.get_running_loop().run_in_executor(executor, call)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        on_cancel()
        try:
            await ended([future])
        finally:
            if not future.cancelled():
                future.exception()  # of a call that nobody wants any more; else asyncio would report it
        raise
