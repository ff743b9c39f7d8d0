"""Bounds on unpacking one image: files, bytes, and the disk that others need as well."""

import errno
import threading
from pathlib import Path

from nodeagent import disk_reserve
from nodeagent.errors import ResourceExhausted

# A layer that is both larger than this and so many times its blob is a bomb; deflate can do 1032 to 1.
BOMB_BYTES = 1 << 30
BOMB_RATIO = 250

_CHECK_BYTES = 4 << 20
_ENTRY_BYTES = 4096  # a file or directory takes about a block besides its content


class Disk:
    """The disk under a directory, checked again with every few MiB that several threads write."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock = threading.Lock()
        self._written = 0
        self._next_check = 0

    def write(self, size_bytes: int) -> None:
        """Note that so much will be written. Raises `ResourceExhausted` where the node's reserve begins."""
        with self._lock:
            self._written += size_bytes
            check = self._written >= self._next_check
            if check:
                self._next_check = self._written + _CHECK_BYTES
        if check:
            disk_reserve.require_space(self.directory, max(size_bytes, _CHECK_BYTES))


class Budget:
    """The budget of an image's layers, spent by several threads. blob_bytes: the size of all its blobs."""

    def __init__(
        self, directory: Path, *, max_bytes: int, max_entries: int, blob_bytes: int = 0
    ) -> None:
        self._disk = Disk(directory)
        self._max_bytes = max_bytes
        self._max_entries = max_entries
        self._max_added = bomb_limit(blob_bytes)
        self._lock = threading.Lock()
        self._bytes = 0
        self._entries = 0
        self._added = 0

    def spend(self, entries: int = 0, size_bytes: int = 0) -> None:
        """Count entries and bytes. Raises `ResourceExhausted` when a bound or the disk's is reached."""
        with self._lock:
            self._entries += entries
            self._bytes += size_bytes
        if self._entries > self._max_entries:
            raise ResourceExhausted(f"the image has more than {self._max_entries} files")
        if self._bytes > self._max_bytes:
            raise ResourceExhausted(f"the image unpacks to more than {self._max_bytes} bytes")
        self._disk.write(size_bytes + entries * _ENTRY_BYTES)

    def add(self, size_bytes: int) -> None:
        """Spend bytes that are in no archive: copies of files of lower layers, and rest of blocks of sparse files."""
        with self._lock:
            self._added += size_bytes
        if self._added > self._max_added:
            raise ResourceExhausted(
                f"the image's layers copy more than {self._max_added} bytes out of one another"
            )
        self.spend(size_bytes=size_bytes)

    def require(self, size_bytes: int) -> None:
        """Raise `ResourceExhausted` where the disk has no room for so much; nothing is spent."""
        disk_reserve.require_space(self._disk.directory, size_bytes)

    def _return(self, entries: int, size_bytes: int, added_bytes: int) -> None:
        with self._lock:
            self._entries -= entries
            self._bytes -= size_bytes
            self._added -= added_bytes


class Share(Budget):
    """The part of an image's budget that one attempt at a layer spends; given back if the attempt fails."""

    def __init__(self, whole: Budget) -> None:
        self._whole = whole
        self._bytes = 0
        self._entries = 0
        self._added = 0

    def spend(self, entries: int = 0, size_bytes: int = 0) -> None:
        self._entries += entries
        self._bytes += size_bytes
        self._whole.spend(entries, size_bytes)

    def add(self, size_bytes: int) -> None:
        self._bytes += size_bytes
        self._added += size_bytes
        self._whole.add(size_bytes)

    def require(self, size_bytes: int) -> None:
        self._whole.require(size_bytes)

    def give_back(self) -> None:
        self._whole._return(self._entries, self._bytes, self._added)  # noqa: SLF001 (its own kind)


def bomb_limit(blob_bytes: int) -> int:
    """The size to which blobs of this size may unpack."""
    return max(BOMB_BYTES, BOMB_RATIO * blob_bytes)


def is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
