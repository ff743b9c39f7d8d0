"""The launcher, whichever it is now. One that died is replaced when it is next needed: supervisors live without it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from nodeagent.sandbox.client import Launcher

log = logging.getLogger(__name__)


class Launchers:
    """start: connects to the one that runs, or starts one."""

    def __init__(self, start: Callable[[], Awaitable[Launcher]]) -> None:
        self._start = start
        self._lock = asyncio.Lock()
        self._current: Launcher | None = None

    async def get(self) -> Launcher:
        """A launcher that lives, as far as anybody knows."""
        async with self._lock:
            if self._current is not None and self._current.lost.is_set():
                log.warning("the launcher died, starting another")
                self._current.close()
                self._current = None
            if self._current is None:
                self._current = await self._start()
            return self._current
