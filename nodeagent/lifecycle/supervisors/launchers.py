"""The launcher, kept alive and connected: one that died, or does not answer, is replaced at once.

Supervisors live without it, but then nothing keeps what their successors would need.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from nodeagent.sandbox.agent.client import Launcher
from nodeagent.tasks import Tasks, pauses

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0


class Launchers:
    """The present launcher. start: connects to the one that runs, or starts one."""

    def __init__(self, start: Callable[[], Awaitable[Launcher]], tasks: Tasks) -> None:
        self._start = start
        self._tasks = tasks
        self._lock = asyncio.Lock()
        self._current: Launcher | None = None
        self._keeping = tasks.part()
        # Why there is none, since the last attempt to have one.
        self.trouble = ""

    def start(self) -> None:
        """Keep a launcher running from now on."""
        self._keeping.keep("launcher", self._keep, longest_pause_seconds=RETRY_SECONDS)

    async def close(self) -> None:
        """Stop keeping one; the present launcher may go on or end, and `get` still works."""
        await self._keeping.close()

    async def _keep(self) -> None:
        now, between = asyncio.get_running_loop().time, pauses(RETRY_SECONDS)
        while True:
            launcher, began = await self.get(), now()
            await launcher.ended.wait()
            if now() - began > RETRY_SECONDS:
                between = pauses(RETRY_SECONDS)
            else:  # it may be so with the next one, and with each of them
                await asyncio.sleep(next(between))

    async def get(self) -> Launcher:
        """A launcher that is connected as far as is known. Cancelling a caller does not cancel the start of one."""
        return await asyncio.shield(self._tasks.start("launcher", self._get()))

    async def _get(self) -> Launcher:
        async with self._lock:
            if self._current is not None and self._current.ended.is_set():
                if await self._current.has_died():
                    log.warning("the launcher died, starting another")
                else:
                    log.warning("the connection to the launcher has ended, connecting again")
                self._current.close()
                self._current = None
            if self._current is None:
                self._current = await self._start_one()
            return self._current

    async def _start_one(self) -> Launcher:
        try:
            launcher = await self._start()
        except Exception as error:
            self.trouble = str(error) or repr(error)
            raise
        self.trouble = ""
        return launcher
