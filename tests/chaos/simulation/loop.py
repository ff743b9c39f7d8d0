"""An event loop with virtual time and an order of events that a seed decides.

The order of callbacks is the one that asyncio promises (first come, first served); which of the events that are due at
one moment comes first, and how long anything outside the agent takes, the seed decides. Nothing is ever waited for:
when nothing is left to do, the clock jumps to the next event.
"""

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from random import Random
from typing import Any
from weakref import WeakKeyDictionary

MAX_TURNS = 400_000
MANY = 500

# The life of the agent to which a task or a callback belongs; None for clients, and for the machine.
LIFE: ContextVar["Life | None"] = ContextVar("LIFE", default=None)


class Deadlock(Exception):
    """Somebody waits, and nothing can happen any more."""


class Livelock(Exception):
    """More happens than can ever be necessary."""


class Killed(BaseException):
    """Raised at a boundary of an agent that has been killed: none of its code has an effect any more."""


class Life:
    """One process of the agent, from its start to its end."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.is_dead = False


class Task(asyncio.Task[Any]):
    """A task whose place in a set does not depend on its address."""

    def __init__(self, coro: Any, number: int, context: Context, **options: Any) -> None:
        self.number = number  # first: asyncio puts it into a set
        self.context = context
        self.life = context.get(LIFE)
        super().__init__(coro, context=context, **options)

    def __hash__(self) -> int:
        return self.number

    def close(self) -> None:
        """Let it go as it is, without an effect and without a word."""
        self._log_destroy_pending = False
        coro: Any = self.get_coro()
        try:
            self.context.run(coro.close)
        except BaseException:  # noqa: BLE001 it has no effect
            pass


class Loop(asyncio.BaseEventLoop):
    """See the module. `after` makes an event of the machine, which no death of an agent cancels."""

    _ready: deque[asyncio.Handle]
    _scheduled: list[Any]

    def __init__(self, random: Random) -> None:
        super().__init__()
        self.random = random
        self.turns = 0
        self.failures: list[dict[str, Any]] = []
        self.on_turn: Callable[[], None] = lambda: None
        self.on_death: Callable[[], None] = lambda: None
        self.on_reader: Callable[[int], None] = lambda _fd: None
        self._time = 0.0
        self._numbers = 0
        self._queues: WeakKeyDictionary[Any, deque[Callable[[], None]]] = WeakKeyDictionary()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._buried: list[Life] = []
        self._dying: Life | None = None
        self.tasks: list[Task] = []  # some of them done
        self.readers: dict[int, asyncio.Handle] = {}
        self.writers: dict[int, asyncio.Handle] = {}
        self.set_task_factory(self._make_task)  # type: ignore[arg-type]
        self.set_exception_handler(self._failed)

    # --- time ---

    def time(self) -> float:
        return self._time

    def after(self, seconds: float, callback: Callable[[], None]) -> None:
        self._numbers += 1
        heapq.heappush(self._events, (self._time + seconds, self._numbers, callback))

    def soon(self) -> float:
        """How long something takes that takes no time: often no time at all, so that several are due at once."""
        return self.random.choice((0.0, 0.0, 0.0005, 0.001, 0.001, 0.003, 0.01))

    # --- the turn of the loop ---

    def _run_once(self) -> None:
        self.turns += 1
        if self.turns > MAX_TURNS:
            raise Livelock(f"{MAX_TURNS} turns")
        ready: deque[asyncio.Handle] = self._ready
        if not ready:
            self._advance()
        self._take_due(ready)
        if self._has_buried():
            return
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle._cancelled:
                handle._run()
                if self._has_buried():
                    break
        self.on_turn()

    def _advance(self) -> None:
        timers = self._scheduled
        while timers and timers[0]._cancelled:
            timers_gone = heapq.heappop(timers)
            timers_gone._scheduled = False
        due = [timers[0]._when] if timers else []
        due += [self._events[0][0]] if self._events else []
        if not due:
            raise Deadlock("nothing can happen any more")
        self._time = max(self._time, min(due))

    def _take_due(self, ready: deque[asyncio.Handle]) -> None:
        timers, due = self._scheduled, []
        while timers and timers[0]._when <= self._time:
            timer = heapq.heappop(timers)
            timer._scheduled = False
            if not timer._cancelled:
                due.append(timer)
        while self._events and self._events[0][0] <= self._time:
            due.append(heapq.heappop(self._events)[2])
        if len(due) > 1:
            self.random.shuffle(due)
        for each in due:
            if isinstance(each, asyncio.Handle):
                ready.append(each)
            else:
                each()

    # --- descriptors ---

    def add_reader(self, fd: Any, callback: Any, *args: Any) -> None:  # type: ignore[override]
        self.readers[_number(fd)] = asyncio.Handle(callback, args, self, None)
        self.on_reader(_number(fd))

    def remove_reader(self, fd: Any) -> bool:
        return self.readers.pop(_number(fd), None) is not None

    def add_writer(self, fd: Any, callback: Any, *args: Any) -> None:  # type: ignore[override]
        self.writers[_number(fd)] = asyncio.Handle(callback, args, self, None)

    def remove_writer(self, fd: Any) -> bool:
        return self.writers.pop(_number(fd), None) is not None

    def is_readable(self, fd: int) -> None:
        """Tell the loop that a descriptor may be readable: its reader, which may find nothing, is called."""
        handle = self.readers.get(fd)
        if handle is not None:
            self._ready.append(handle)

    def is_writable(self, fd: int) -> None:
        handle = self.writers.get(fd)
        if handle is not None:
            self._ready.append(handle)

    # --- threads ---

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]
        """Do the work of a thread at one moment, and end at another. Cancelled before, it never begins."""
        future: asyncio.Future[Any] = self.create_future()
        life = LIFE.get()

        def end(result: Any, error: BaseException | None) -> None:
            if future.cancelled() or (life is not None and life.is_dead):
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        def begin() -> None:
            if future.cancelled() or (life is not None and life.is_dead):
                return
            result, error = None, None
            try:
                result = func(*args)
            except BaseException as raised:  # noqa: BLE001 it goes to whoever waits
                error = raised
            self.after(self.soon(), lambda: end(result, error))

        if getattr(executor, "_max_workers", 0) == 1:  # in turn
            queue = self._queues.setdefault(executor, deque())
            queue.append(begin)
            self.after(self.soon(), lambda: queue.popleft()())  # noqa: PLW0108 popleft, when it is due
        else:
            self.after(self.soon(), begin)
        return future

    # --- tasks, and the death of an agent ---

    def _make_task(
        self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **options: Any
    ) -> Task:
        self._numbers += 1
        given: Context | None = options.pop("context", None)
        context = copy_context() if given is None else given
        task = Task(coro, self._numbers, context, loop=loop, **options)
        if len(self.tasks) > MANY:
            self.tasks = [one for one in self.tasks if not one.done()]
        self.tasks.append(task)
        return task

    def kill(self, life: Life) -> None:
        """Kill the agent: from now on nothing that it does has an effect; after this callback nothing of it is left."""
        if not life.is_dead:
            life.is_dead = True
            self._dying = life

    def tasks_of(self, life: Life) -> list[Task]:
        return [task for task in self.tasks if task.life is life and not task.done()]

    def _has_buried(self) -> bool:
        """Bury an agent that has been killed in this turn."""
        if self._dying is None:
            return False
        self.bury()
        self.on_death()
        return True

    def bury(self) -> None:
        life = self._dying
        assert life is not None
        self._buried.append(life)
        closed: set[Task] = set()
        # Undoing begins further tasks.
        while tasks := [task for task in self.tasks_of(life) if task not in closed]:
            for task in tasks:
                closed.add(task)
                task.close()
        self._dying = None
        base: Any = self

        def mine(handle: Any) -> bool:
            return handle._context.get(LIFE) is life

        base._ready = deque(h for h in base._ready if not mine(h))
        base._scheduled = [h for h in base._scheduled if not mine(h)]
        heapq.heapify(base._scheduled)
        for table in (self.readers, self.writers):
            for fd in [fd for fd, handle in table.items() if mine(handle)]:
                del table[fd]

    def _failed(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if isinstance(context.get("exception"), Killed):
            return
        culprit = context.get("task") or context.get("future")
        life = getattr(culprit, "life", LIFE.get())
        if self._dying is not None or (life is not None and life.is_dead):
            return
        if culprit is not None and not isinstance(culprit, Task) and self._buried:
            return  # a future of an agent that is dead
        self.failures.append(context)

    def _asyncgen_finalizer_hook(self, agen: Any) -> None:
        """Let a generator go that nobody has finished: it is a dead agent's."""

    # --- what a selector loop would have ---

    def _process_events(self, event_list: Any) -> None:
        """There is no selector."""

    def _write_to_self(self) -> None:
        """There is no other thread."""


def _number(fd: Any) -> int:
    return fd if isinstance(fd, int) else fd.fileno()
