"""The size of writable layers, measured in the background.

A layer is walked at most every `DISK_SECONDS` while it is asked for, and `WALKS` of them at once. Its content is the
container's choice: neither the number of its files nor their depth delays a request or takes the node's descriptors.
"""

import asyncio
import os
import stat
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from nodeagent.tasks import Tasks

DISK_SECONDS = 10.0
FIRST_SECONDS = 1.0  # the longest that a request waits for the first walk of a layer
WALKS = 2
# Files with several names that a walk remembers, in 4 to 6 MB of memory.
REMEMBERED = 65_536

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskUsage:
    """A writable layer. mountpoint: a directory on its file system. The sizes are None before the first walk ended."""

    mountpoint: str
    used_bytes: int | None
    inodes_used: int | None
    at_ns: int


@dataclass(slots=True)
class _Layer:
    """The state of a layer. due: of time.monotonic, when the next walk may begin."""

    usage: DiskUsage | None = None
    due: float = 0.0
    walk: asyncio.Task[None] | None = field(default=None)


class Disks:
    """The layers' sizes. directory: has them, as ``<container id>/upper``, and the image volumes beside each."""

    def __init__(self, directory: Path, tasks: Tasks) -> None:
        self._directory = directory
        self._tasks = tasks
        self._layers: dict[str, _Layer] = {}
        self._turns = asyncio.Semaphore(WALKS)

    async def usage(self, container_id: str) -> DiskUsage:
        """The usage that the last walk found."""
        layer = self._layers.setdefault(container_id, _Layer())
        if layer.walk is None and layer.due <= time.monotonic():
            walk = self._walk(container_id, layer)
            layer.walk = self._tasks.run("disk usage", walk, about=f'container "{container_id}"')
            if layer.usage is None:
                await asyncio.wait((layer.walk,), timeout=FIRST_SECONDS)
        return layer.usage or DiskUsage(
            mountpoint=str(self._directory),
            used_bytes=None,
            inodes_used=None,
            at_ns=time.time_ns(),
        )

    async def _walk(self, container_id: str, layer: _Layer) -> None:
        try:
            async with self._turns:
                own = self._directory / container_id
                layer.usage = await asyncio.to_thread(measure, own / "upper", own / "volumes")
        finally:
            layer.walk = None
            layer.due = time.monotonic() + DISK_SECONDS

    def keep(self, container_ids: Collection[str]) -> None:
        """Forget the layers of all other containers."""
        for container_id in [key for key in self._layers if key not in container_ids]:
            del self._layers[container_id]


def measure(directory: Path, *more: Path) -> DiskUsage:
    """Bytes allocated and inodes below directories; a file of several names is counted once, as du(1) does.

    more: beside `directory`, where there are any.

    Links are not followed; what vanishes meanwhile is not counted. Once `REMEMBERED` files with several names are
    known, every name of a further one counts for its share of the file, st_nlink being the number of shares: right
    again when all names have been seen, too little where some are outside of the directory.
    """
    used_bytes = inodes = 0.0
    linked: set[int] = set()
    for status in chain.from_iterable(map(_Walk, (directory, *more))):
        share = _share(status, linked)
        used_bytes += status.st_blocks * 512 * share  # the unit of st_blocks (inode(7))
        inodes += share
    return DiskUsage(
        mountpoint=str(directory.parents[1]),
        used_bytes=round(used_bytes),
        inodes_used=round(inodes),
        at_ns=time.time_ns(),
    )


def _share(status: os.stat_result, linked: set[int]) -> float:
    """The share of a file that counts at this name of it; `linked` has the inodes that were counted wholly."""
    if status.st_nlink == 1 or stat.S_ISDIR(status.st_mode):
        return 1.0
    if status.st_ino in linked:
        return 0.0
    if len(linked) >= REMEMBERED:
        return 1.0 / status.st_nlink
    linked.add(status.st_ino)
    return 1.0


class _Walk:
    """The status of everything below a directory, with one descriptor at any depth: the way up is "..".

    A directory that is moved while the walk is in it ends the walk: what is above it now may be somewhere else.
    """

    def __init__(self, top: Path) -> None:
        self._top = top
        self._descriptor = -1
        # From the top to where the walk is: inode, and the directories in it that are still to be entered.
        self._levels: list[tuple[int, list[str]]] = []

    def __iter__(self) -> Iterator[os.stat_result]:
        with suppress(FileNotFoundError):
            self._descriptor = os.open(self._top, _DIRECTORY)
        if self._descriptor < 0:
            return
        try:
            entered = True
            while entered:
                yield from self._read()
                entered = self._go_on()
        finally:
            os.close(self._descriptor)

    def _read(self) -> Iterator[os.stat_result]:
        names: list[str] = []
        with os.scandir(self._descriptor) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISDIR(status.st_mode):
                        names.append(entry.name)
                    yield status
        self._levels.append((os.fstat(self._descriptor).st_ino, names))

    def _go_on(self) -> bool:
        """Enter the next directory, here or above; False at the end."""
        while True:
            _, names = self._levels[-1]
            while names:
                if self._enter(names.pop()):
                    return True
            self._levels.pop()
            if not self._levels or not self._enter(".."):
                return False
            if os.fstat(self._descriptor).st_ino != self._levels[-1][0]:
                return False

    def _enter(self, name: str) -> bool:
        """Enter a directory; False for one that has gone, or is none any more."""
        try:
            entered = os.open(name, _DIRECTORY, dir_fd=self._descriptor)
        except (FileNotFoundError, NotADirectoryError):
            return False
        os.close(self._descriptor)
        self._descriptor = entered
        return True
