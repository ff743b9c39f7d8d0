"""A process at the other end of a connection that owes an answer and says nothing: it is stopped, or hangs."""

import asyncio
import logging
from collections.abc import Callable

from nodeagent.linux import waiting
from nodeagent.sandbox.agent import deadlines

log = logging.getLogger(__name__)


class Silence:
    """Notices it, and logs it once; the end of it as well.

    name: of the process, in the log. owes: whether an answer is waited for; one that nobody waits for any more is owed
    as well, until anything comes. ask: puts a question that is answered by the process itself, at once, whatever the
    answer is. text: why it does not answer, "" while it does.
    """

    def __init__(
        self, name: str, pid: int, owes: Callable[[], bool], ask: Callable[[], None]
    ) -> None:
        self.text = ""
        self._name = name
        self._pid = pid
        self._owes = owes
        self._ask = ask
        self._loop = asyncio.get_running_loop()
        self._heard_at = self._owed_since = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None

    def watch(self) -> None:
        """Call this when an answer is asked for. One timer serves all that are."""
        if self._heard_at >= self._owed_since:
            self._owed_since = self._loop.time()  # the first question since it has spoken
        if self._timer is None and not self.text:
            self._look_later(self._owed_since, was_asked=False)

    def heard(self) -> None:
        """Call this when anything has come."""
        self._heard_at = self._loop.time()
        if self.text:
            self.text = ""
            log.info("%s: process %d answers again", self._name, self._pid)

    def overdue(self, since: float) -> None:
        """Call this when an answer, asked for at this time of the loop, has not come within its deadline."""
        if self._heard_at < since and not self.text:
            why = waiting.explained(self._pid)
            self.text = f"process {self._pid} does not answer: {why}"
            log.warning("%s: process %d does not answer: %s", self._name, self._pid, why)

    def close(self) -> None:
        """Notice nothing any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _look_later(self, since: float, *, was_asked: bool) -> None:
        half = deadlines.SILENCE_SECONDS / 2
        self._timer = self._loop.call_later(half, self._look, since, was_asked)

    def _look(self, since: float, was_asked: bool) -> None:
        self._timer = None
        if self._heard_at >= since:
            if self._heard_at < self._owed_since:
                self._look_later(self._owed_since, was_asked=False)
            elif self._owes():
                self.watch()
        elif was_asked:
            self.overdue(since)
        else:
            # What it owes may take long, as a creation does; the answer to this does not.
            self._ask()
            self._look_later(since, was_asked=True)
