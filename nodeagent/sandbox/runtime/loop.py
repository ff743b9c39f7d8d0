"""An event loop of one thread: descriptors that become ready, and timers.

Nothing blocks but the wait itself. A handler may be called once too often, when its descriptor has just taken the
number of another that was closed: handlers read without blocking and tolerate that there is nothing.
"""

import heapq
import select
import sys
import time
from collections.abc import Callable

READABLE = select.EPOLLIN
WRITABLE = select.EPOLLOUT

Handler = Callable[[int], None]

# Cancelled timers are swept when there are so many in all, and then twice as many as were left.
_SWEEP_AT = 64

_PERSIST_MS = 1000


class Timer:
    """An action that is due at `at`, in ns of the monotonic clock."""

    __slots__ = ("action", "at")

    def __init__(self, at: int, action: Callable[[], None]) -> None:
        self.at = at
        self.action: Callable[[], None] | None = action

    def __lt__(self, other: "Timer") -> bool:
        return self.at < other.at

    def cancel(self) -> None:
        self.action = None


class Loop:
    """Runs until `stop`. A handler or an action that raises is reported, and the loop goes on."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._timers: list[Timer] = []
        self._sweep_at = _SWEEP_AT
        self._running = False

    def watch(self, descriptor: int, handler: Handler, events: int = READABLE) -> None:
        """Call `handler` with the events whenever the descriptor is ready; errors and hang-ups always count.

        Raises OSError: ENOMEM, or ENOSPC at the limit of /proc/sys/fs/epoll.
        """
        self._epoll.register(descriptor, events)
        self._handlers[descriptor] = handler

    def change(self, descriptor: int, events: int) -> None:
        self._epoll.modify(descriptor, events)

    def forget(self, descriptor: int) -> None:
        """Stop watching. To be called before the descriptor is closed: a copy elsewhere would keep it in the set."""
        if self._handlers.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def call_at(self, at: int, action: Callable[[], None]) -> Timer:
        """Call `action` once. at: ns of the monotonic clock."""
        if len(self._timers) >= self._sweep_at:
            self._sweep()
        timer = Timer(at, action)
        heapq.heappush(self._timers, timer)
        return timer

    def _sweep(self) -> None:
        """Drop cancelled timers: a command that ends in a millisecond leaves that of its timeout, maybe an hour."""
        self._timers = [timer for timer in self._timers if timer.action is not None]
        heapq.heapify(self._timers)
        self._sweep_at = max(_SWEEP_AT, 2 * len(self._timers))

    def call_after(self, delay_ms: int, action: Callable[[], None]) -> Timer:
        return self.call_at(time.monotonic_ns() + delay_ms * 1_000_000, action)

    def persist(self, action: Callable[[], None], what: str) -> None:
        """Call it, and again every second for as long as it raises OSError: for what a shortage must not end.

        what: what cannot be done yet, for the log.
        """
        try:
            action()
        except OSError as error:
            report(f"{what} yet: {error}")
            self.call_after(_PERSIST_MS, lambda: self.persist(action, what))

    def stop(self) -> None:
        """Return from `run` when the current round is over."""
        self._running = False

    def run(self) -> None:
        self._running = True
        while self._running:
            for descriptor, events in self._epoll.poll(self._patience()):
                # An earlier handler of this round may have closed it.
                handler = self._handlers.get(descriptor)
                if handler is not None:
                    guarded(handler, events)
            self._run_timers()

    def _patience(self) -> float | None:
        """Seconds until the next timer is due; rounded up, or it would be waited for in small steps."""
        while self._timers and self._timers[0].action is None:
            heapq.heappop(self._timers)
        if not self._timers:
            return None
        return max(0.0, (self._timers[0].at - time.monotonic_ns()) / 1e9 + 0.0005)

    def _run_timers(self) -> None:
        now = time.monotonic_ns()
        while self._timers and self._timers[0].at <= now:
            action = heapq.heappop(self._timers).action
            if action is not None:
                guarded(action)


def guarded(action: Callable[..., None], *arguments: object) -> None:
    """Call it; an exception is reported and goes no further."""
    try:
        action(*arguments)
    except Exception:  # noqa: BLE001 one broken request must not take the pod with it
        _report_exception()


def report(text: str) -> None:
    """Write to the log of the launcher and its children; if that is full or gone, the text is lost."""
    try:
        sys.stderr.write(text.rstrip() + "\n")
        sys.stderr.flush()
    except OSError:
        pass


def _report_exception() -> None:
    """Report it as the interpreter does, without the modules that `traceback` imports."""
    try:
        sys.__excepthook__(*sys.exc_info())
        sys.stderr.flush()
    except OSError:
        pass
