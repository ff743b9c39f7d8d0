"""Throttling by servers that ask for a pause, which all pulls of the node observe together.

::

    open ── 429, or 503 with Retry-After ──► held ── the pause is over ──► narrow ── good answers ──► open

While a server is held, no request is sent to it. Then one request goes first, and with each good answer twice as many
may be under way, so that the waiting layers of all pulls do not come all at once (RFC 6585, 4; RFC 9110, 10.2.3).
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from http import HTTPStatus

from yarl import URL

from nodeagent.errors import RegistryUnavailable

log = logging.getLogger(__name__)

LONGEST_SECONDS = 60.0  # no pull waits longer for an answer, and no server is left alone longer
FIRST_SECONDS = 1.0  # where the server does not say how long; twice as long each time

_WIDE = 64  # requests under way at which a server is trusted again
_MANY = 256  # servers, before those that are over with are looked for


class Throttled(RegistryUnavailable):
    """A server has asked for a pause. until: its end, in the event loop's time. sent: it refused a request just now."""

    def __init__(self, text: str, until: float, *, sent: bool) -> None:
        super().__init__(text)
        self.until = until
        self.sent = sent

    def told_as(self, text: str) -> "Throttled":
        return Throttled(text, self.until, sent=self.sent)


class Throttles:
    """The state of each server that has asked for a pause, or has a request under way."""

    def __init__(self) -> None:
        self._throttles: dict[URL, _Throttle] = {}

    @asynccontextmanager
    async def turn(self, url: URL) -> AsyncIterator["Turn"]:
        """Wait for permission to send one request. Raises `Throttled` while a pause lasts.

        An error in the block after the server has asked for a pause becomes `Throttled` as well.
        """
        throttle = self._of(url.origin())
        await throttle.enter()
        turn = Turn(throttle)
        try:
            yield turn
        except RegistryUnavailable as error:
            if turn.until is None:
                raise
            raise Throttled(f"{error}{turn.note}", turn.until, sent=True) from None
        except asyncio.CancelledError:
            turn.abandon()
            raise
        finally:
            turn.end()
            if throttle.is_open:
                self._throttles.pop(throttle.origin, None)

    def _of(self, origin: URL) -> "_Throttle":
        if origin not in self._throttles and len(self._throttles) >= _MANY:
            self._throttles = {
                url: throttle for url, throttle in self._throttles.items() if not throttle.is_over
            }
        return self._throttles.setdefault(origin, _Throttle(origin))


class Turn:
    """A request, until the head of its answer is there. until: the end of the pause that the answer asks for."""

    def __init__(self, throttle: "_Throttle") -> None:
        self.until: float | None = None
        self.note = ""
        self._throttle: _Throttle | None = throttle

    def answered(self, status: int, headers: Mapping[str, str]) -> None:
        if self._throttle is None:
            return
        asked = pause_asked_for(headers)
        if status == HTTPStatus.TOO_MANY_REQUESTS or (
            status == HTTPStatus.SERVICE_UNAVAILABLE and asked is not None
        ):
            self.until = self._throttle.hold(asked)
            self.note = f": asks for a pause of {asked:.0f} s" if asked else ""
        else:
            self._throttle.widen()
        self._leave()

    def end(self) -> None:
        """End a request. A server that did not answer at all is not throttling."""
        if self._throttle is not None:
            self._throttle.open()
            self._leave()

    def abandon(self) -> None:
        """End a request that was cancelled, which says nothing about the server."""
        if self._throttle is not None:
            self._leave()

    def _leave(self) -> None:
        assert self._throttle is not None
        self._throttle.leave()
        self._throttle = None


class _Throttle:
    def __init__(self, origin: URL) -> None:
        self.origin = origin
        self._held_until = 0.0
        self._asked_until = 0.0
        self._next_pause = 0.0
        self._width = math.inf
        self._under_way = 0
        self._changed = asyncio.Event()

    @property
    def is_open(self) -> bool:
        return self._width == math.inf and not self._under_way

    @property
    def is_over(self) -> bool:
        return not self._under_way and _now() > self._held_until + LONGEST_SECONDS

    async def enter(self) -> None:
        while True:
            if _now() < self._held_until:
                left = self._asked_until - _now()
                raise Throttled(
                    f"{self.origin}: has asked for a pause, of which {left:.0f} s are left",
                    self._asked_until,
                    sent=False,
                )
            if self._under_way < self._width:
                self._under_way += 1
                return
            await self._changed.wait()

    def leave(self) -> None:
        self._under_way -= 1
        self._tell()

    def hold(self, seconds: float | None) -> float:
        """Hold the server for so long, else for a growing pause, and return its end; refusals at once count once."""
        now = _now()
        if now >= self._held_until:
            self._next_pause = min(2 * self._next_pause or FIRST_SECONDS, LONGEST_SECONDS)
            log.info("%s: asks for a pause (Retry-After %s)", self.origin, seconds)
            self._asked_until = now
        self._asked_until = max(self._asked_until, now + (seconds or self._next_pause))
        self._held_until = min(self._asked_until, now + LONGEST_SECONDS)
        self._width = 1
        self._tell()
        return self._asked_until

    def widen(self) -> None:
        """Allow twice as many requests, after a good answer."""
        if _now() >= self._held_until:
            self._next_pause = 0.0
            self._width = 2 * self._width if self._width < _WIDE else math.inf

    def open(self) -> None:
        if _now() >= self._held_until:
            self._width = math.inf

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def is_too_long(until: float) -> bool:
    """Whether a pull should fail now rather than wait for a server."""
    return until - _now() > LONGEST_SECONDS


def pause_asked_for(headers: Mapping[str, str]) -> float | None:
    """The seconds in a Retry-After header: a number, or a date, which is compared with the server's own clock."""
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        then = parsedate_to_datetime(text)
        return max(0.0, (then - parsedate_to_datetime(headers.get("Date", ""))).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return None


def _now() -> float:
    return asyncio.get_running_loop().time()
