"""The directories of containers: below the root directory, whose disk may be slow, or stand still (a snapshot).

One thread makes them and moves them to the trash, in the order in which it was asked to: what a creation that was given
up has asked for is made before its undo looks for it. The event loop, and the threads that others use, never wait.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from nodeagent import files
from nodeagent.lifecycle.creations import doing
from nodeagent.trash import Trash

T = TypeVar("T")


class Directories:
    """root: the directory that has one for each container, named like it. trash: on the same file system."""

    def __init__(self, root: Path, trash: Trash) -> None:
        self._root = root
        self._trash = trash
        self._thread = ThreadPoolExecutor(1, "directories")  # ends with this object

    def path(self, container_id: str) -> Path:
        return self._root / container_id

    async def make(self, container_id: str) -> None:
        """Make the directory of a container, for root alone: in `upper` there may be set-user-ID programs and devices.

        `upper` itself is the root directory of the container, for all users in it.
        """
        await self._run(partial(_make, self.path(container_id)))

    async def take(self, container_id: str) -> None:
        """Move what a container has on disk to the trash; what is not there has gone already."""
        await self._run(partial(self._trash.move, self.path(container_id)), self._discard)

    def _discard(self, moved: Path | None) -> None:
        if moved is not None:
            self._trash.discard(moved)

    async def _run(
        self, call: Callable[[], T], then: Callable[[T], None] = lambda _result: None
    ) -> None:
        """Have the thread call it. Both go on when the caller is cancelled."""
        doing(f"waiting for the file system of {self._root}")
        future = asyncio.get_running_loop().run_in_executor(self._thread, call)

        def end(ended: asyncio.Future[T]) -> None:
            if ended.exception() is None:
                then(ended.result())

        future.add_done_callback(end)
        await asyncio.shield(future)


def _make(directory: Path) -> None:
    directory.mkdir(mode=0o700)
    for name, mode in (("upper", 0o755), ("work", 0o700)):
        files.ensure_directory(str(directory / name), mode)
