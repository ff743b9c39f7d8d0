"""Files on their way out: moved aside at once, removed behind the requests, also after a crash.

What is damaged is set aside for good: something that runs may use it, and somebody may want to look at it.
"""

import asyncio
import secrets
from functools import partial
from pathlib import Path

from nodeagent import files
from nodeagent.tasks import Tasks, cancel, ended, to_the_end

QUARANTINE = "quarantine"  # directory of the root for what is set aside; nobody removes it
RETRY_SECONDS = 30.0  # until a tree that could not be removed is tried again
# Between failures: the trees behind one that cannot be removed do not wait long for it.
LONGEST_PAUSE_SECONDS = 1.0


def set_aside(path: Path, quarantine: Path) -> Path:
    """Move a file or a tree into a directory of the same file system, under a name of its own, and return that."""
    files.ensure_directory(str(quarantine), mode=0o700)
    target = quarantine / f"{path.name}-{secrets.token_hex(4)}"
    path.rename(target)
    return target


class Trash:
    """A directory for what is on its way out, and for what is being made and may have to go.

    It is on the file system of what it takes, so that things get in and out by rename. What an earlier agent left in
    it is removed. name: of the task that removes.
    """

    def __init__(self, directory: Path, name: str, tasks: Tasks) -> None:
        self.directory = directory
        self._name = name
        self._tasks = tasks.part()
        self._leaving: asyncio.Queue[Path] = asyncio.Queue()
        files.ensure_directory(str(directory), mode=0o700)
        for path in directory.iterdir():
            self.discard(path)
        self._keeper = self._tasks.keep(
            name, self._empty, longest_pause_seconds=LONGEST_PAUSE_SECONDS
        )

    def path(self, kind: str) -> Path:
        """A name in the directory that nothing has."""
        return self.directory / f"{kind}-{secrets.token_hex(8)}"

    def take(self, path: Path) -> None:
        """Move a tree here and discard it; one that is not there has gone already."""
        moved = self.move(path)
        if moved is not None:
            self.discard(moved)

    def move(self, path: Path) -> Path | None:
        """Move a tree here, for `discard`; None for one that is not there. For any thread."""
        target = self.path(path.name)
        try:
            return path.rename(target)
        except FileNotFoundError:
            return None

    def discard(self, path: Path) -> None:
        """Remove a tree that is in the directory, behind the requests."""
        self._leaving.put_nowait(path)

    async def emptied(self) -> None:
        """Return once everything that was discarded so far has gone, or could not be removed."""
        await self._leaving.join()

    async def close(self) -> None:
        """Finish what was discarded. What cannot be removed is left to the next agent."""
        await cancel(self._keeper)
        for _ in range(self._leaving.qsize()):  # what fails may come back
            removal = self._remove(self._leaving.get_nowait())
            await ended([self._tasks.run(self._name, removal)])
        await self._tasks.close()

    async def _empty(self) -> None:
        while True:
            await self._remove(await self._leaving.get())

    async def _remove(self, path: Path) -> None:
        try:
            await to_the_end(None, partial(files.remove_tree, str(path)))
        except Exception:
            # Later, and not at the head of the queue: the trees behind it are not to wait for this one.
            asyncio.get_running_loop().call_later(RETRY_SECONDS, self.discard, path)
            raise
        finally:
            self._leaving.task_done()
