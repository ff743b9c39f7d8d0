"""What unpacking one image may take: files, bytes, and disk that others need as well."""

import errno
import os
import threading
from pathlib import Path

from nodeagent.errors import ResourceExhausted

# A layer that is both larger than this and so many times its blob is a bomb; deflate can do 1032 to 1.
BOMB_BYTES = 1 << 30
BOMB_RATIO = 250

_RESERVE_BYTES = 512 << 20
_RESERVE_SHARE = 50  # of the file system, where that is less
CHECK_BYTES = 4 << 20


class Budget:
    """Counts for all layers of an image, from several threads."""

    def __init__(self, directory: Path, *, max_bytes: int, max_entries: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._max_entries = max_entries
        self._lock = threading.Lock()
        self._bytes = 0
        self._entries = 0
        self._next_check = 0

    def spend(self, entries: int = 0, size_bytes: int = 0) -> None:
        """Raises `ResourceExhausted` when a bound or the disk is reached."""
        with self._lock:
            self._entries += entries
            self._bytes += size_bytes
            check = self._bytes >= self._next_check
            if check:
                self._next_check = self._bytes + CHECK_BYTES
        if self._entries > self._max_entries:
            raise ResourceExhausted(f"the image has more than {self._max_entries} files")
        if self._bytes > self._max_bytes:
            raise ResourceExhausted(f"the image unpacks to more than {self._max_bytes} bytes")
        if check:
            require_space(self._directory, CHECK_BYTES)

    def _return(self, entries: int, size_bytes: int) -> None:
        with self._lock:
            self._entries -= entries
            self._bytes -= size_bytes
            self._next_check -= size_bytes


class Share(Budget):
    """What one attempt at a layer spends of an image's budget; given back where nothing comes of it."""

    def __init__(self, whole: Budget) -> None:
        self._whole = whole
        self._bytes = 0
        self._entries = 0

    def spend(self, entries: int = 0, size_bytes: int = 0) -> None:
        self._entries += entries
        self._bytes += size_bytes
        self._whole.spend(entries, size_bytes)

    def give_back(self) -> None:
        self._whole._return(self._entries, self._bytes)  # noqa: SLF001 (its own kind)


def require_space(directory: Path, size_bytes: int) -> None:
    """Raises `ResourceExhausted` when so much more would not leave the node its reserve."""
    disk = os.statvfs(directory)
    reserve = min(_RESERVE_BYTES, disk.f_blocks * disk.f_frsize // _RESERVE_SHARE)
    available = disk.f_bavail * disk.f_frsize
    if available - size_bytes < reserve:
        raise ResourceExhausted(
            f"{directory}: {available} bytes left on the disk, {size_bytes} needed and {reserve} kept"
        )


def is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
