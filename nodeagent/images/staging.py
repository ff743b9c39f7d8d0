"""A directory for what is being made and for what is on its way out; what an earlier agent left in it goes."""

import asyncio
import logging
import secrets
from pathlib import Path

from nodeagent import files

log = logging.getLogger(__name__)


class Staging:
    """On the file system of the layers, so that things get in and out by rename."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        files.ensure_directory(str(directory), mode=0o700)
        self._leaving: asyncio.Queue[Path | None] = asyncio.Queue()
        for path in directory.iterdir():
            self._leaving.put_nowait(path)
        self._remover = asyncio.create_task(self._run())

    def path(self, kind: str) -> Path:
        """A name that nothing has."""
        return self.directory / f"{kind}-{secrets.token_hex(8)}"

    def discard(self, path: Path) -> None:
        """Remove a tree that is here, behind the requests."""
        self._leaving.put_nowait(path)

    def take(self, path: Path) -> None:
        """Move a tree here at once, and remove it behind the requests."""
        target = self.path("old")
        try:
            path.rename(target)
        except FileNotFoundError:
            return
        self.discard(target)

    async def emptied(self) -> None:
        """Return once everything that was discarded so far is gone."""
        await self._leaving.join()

    async def close(self) -> None:
        """Finish what was discarded."""
        self._leaving.put_nowait(None)
        await self._remover

    async def _run(self) -> None:
        while (path := await self._leaving.get()) is not None:
            await asyncio.to_thread(_remove, path)
            self._leaving.task_done()


def _remove(path: Path) -> None:
    try:
        files.remove_tree(str(path))
    except OSError as error:
        log.warning("cannot remove %s: %s", path, error)
