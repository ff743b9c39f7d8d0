"""Directories on their way out: moved aside at once, removed behind the requests, also after a crash."""

import asyncio
import logging
import secrets
from pathlib import Path

from nodeagent import files

log = logging.getLogger(__name__)


class Trash:
    """A directory on the file system of what it takes; emptied by a task of its own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._wanted = asyncio.Event()
        self._emptier: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin with what an earlier agent left."""
        self._wanted.set()
        self._emptier = asyncio.create_task(self._run())

    def take(self, path: Path) -> None:
        """Move a tree aside; one that is not there is gone already."""
        try:
            path.rename(self._directory / f"{path.name}.{secrets.token_hex(4)}")
        except FileNotFoundError:
            return
        self._wanted.set()

    async def close(self) -> None:
        """Finish what was taken."""
        if self._emptier is not None:
            self._emptier.cancel()
            await asyncio.gather(self._emptier, return_exceptions=True)
        await asyncio.to_thread(self._empty)

    async def _run(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            await asyncio.to_thread(self._empty)

    def _empty(self) -> None:
        for path in self._directory.iterdir():
            try:
                files.remove_tree(str(path))
            except OSError as error:
                log.warning("cannot remove %s: %s", path, error)
