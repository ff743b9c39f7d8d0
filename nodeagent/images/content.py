"""Content that is named by its digest: blobs while they are fetched, and the small documents that are kept.

A layer's blob is in the staging directory while it is fetched and unpacked, then it is removed: a container needs the
unpacked layer. Indexes, manifests and configs are kept in ``blobs/sha256/``.
"""

import hashlib
import io
import logging
import os
import threading
from collections.abc import Collection
from pathlib import Path

from nodeagent import disk_reserve, files
from nodeagent.errors import DataLoss, Unavailable
from nodeagent.images import manifest
from nodeagent.images.budget import Disk
from nodeagent.images.turns import Permits
from nodeagent.linux import syscalls

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.2


class Starved(Exception):
    """A reader that waits for bytes was asked to give way."""


class Blob:
    """A file that one thread writes from its start, while others read what has been written so far.

    Data must not be trusted before a read has returned the end: only then the digest is known to be right.
    """

    def __init__(self, path: Path, digest: str, size: int, *, complete: bool = False) -> None:
        """Open a complete file, whose content is known to have the digest; a new one is made with its first bytes.

        Not here, where the event loop would wait for a file system that stands still.
        """
        self.path = path
        self.digest = digest
        self.size = size
        self.received = size if complete else 0
        self._hash = hashlib.sha256()
        self._disk = Disk(path.parent)
        self._complete = complete
        self._failure: Exception | None = None
        self._changed = threading.Condition()
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if complete else -1

    def append(self, data: bytes) -> None:
        """Add the next bytes; more than the size is a `DataLoss`. Raises `ResourceExhausted` at the disk's reserve."""
        if self.received + len(data) > self.size:
            raise DataLoss(f"{self.digest}: longer than its {self.size} bytes")
        self._disk.write(len(data))
        if self._file < 0:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._file = os.open(self.path, flags, 0o600)
        self._hash.update(data)
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]
        with self._changed:
            self.received += len(data)  # only now, as readers read up to here
            self._changed.notify_all()

    def finish(self) -> None:
        """Compare the complete content with the digest. Raises `DataLoss`."""
        if self.received != self.size:
            raise DataLoss(f"{self.digest}: got {self.received} of {self.size} bytes")
        # The text has no digest of what came: a pod's owner could tell by it what a server in the node's network sent.
        if f"sha256:{self._hash.hexdigest()}" != self.digest:
            raise DataLoss(f"{self.digest}: got {self.size} bytes of another digest")
        with self._changed:
            self._complete = True
            self._changed.notify_all()

    def fail(self, error: Exception) -> None:
        """Note that nothing more will come: readers get the error."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def close(self) -> None:
        """Close the file, when all readers have ended."""
        if self._file >= 0:
            os.close(self._file)

    def read_at(self, buffer: memoryview, offset: int, reader: "BlobReader") -> int:
        """Fill the buffer as far as possible; waits for the first byte. 0 at the verified end."""
        if not self._is_decided(offset):
            self._wait(offset, reader)
        with self._changed:
            if self._failure is not None:
                raise self._failure
            available = self.received - offset
            starved = not self._is_decided(offset)
        reader.check()
        if starved:
            raise Starved(self.digest)
        return os.preadv(self._file, [buffer[:available]], offset) if available else 0

    def wake(self) -> None:
        """Wake the readers, so that they check whether they are stopped."""
        with self._changed:
            self._changed.notify_all()

    def _wait(self, offset: int, reader: "BlobReader") -> None:
        """Wait for bytes at `offset`, without a permit, so that others may work meanwhile."""
        reader.permits.release()
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._is_decided(offset) or reader.is_leaving)
        finally:
            reader.permits.acquire()

    def _is_decided(self, offset: int) -> bool:
        return self._complete or self._failure is not None or self.received > offset


class BlobReader(io.RawIOBase):
    """A reader of a blob from its start, until another thread stops it. Its thread has one of the permits."""

    def __init__(self, blob: Blob, permits: Permits | None = None) -> None:
        self.blob = blob
        self.permits = permits or Permits(1)
        self._stopped = False
        self._gives_way = False
        self._at = 0

    @property
    def position(self) -> int:
        return self._at

    @property
    def is_leaving(self) -> bool:
        """Whether it must not wait any more."""
        return self._stopped or self._gives_way

    def stop(self) -> None:
        self._stopped = True
        self.blob.wake()

    def give_way(self) -> None:
        """Raise `Starved` instead of waiting for bytes."""
        self._gives_way = True
        self.blob.wake()

    def take(self, turn: threading.Lock) -> None:
        """Acquire `turn` once the blob is complete and verified, so that no thread with it waits for a server."""
        self.blob.read_at(memoryview(bytearray(1)), self.blob.size, self)
        self.permits.release()  # others may work meanwhile
        try:
            while not turn.acquire(timeout=_LOOK_SECONDS):
                if self._stopped:
                    raise Unavailable(f"{self.blob.digest}: cancelled")
        finally:
            self.permits.acquire()

    def check(self) -> None:
        """Raise `Unavailable` if stopped, and let others work; to be called regularly while reading."""
        if self._stopped:
            raise Unavailable(f"{self.blob.digest}: cancelled")
        self.permits.pass_on()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        count = self.blob.read_at(memoryview(buffer).cast("B"), self._at, self)
        self._at += count
        return count


class Documents:
    """The indexes, manifests and configs by digest. The calls block: the files are small."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        files.ensure_directory(str(directory), mode=0o700)
        self._sizes = {path.name: path.stat().st_size for path in directory.iterdir()}

    @property
    def used_bytes(self) -> int:
        return sum(list(self._sizes.values()))  # a thread may be adding one

    def __len__(self) -> int:
        return len(self._sizes)

    def get(self, digest: str) -> bytes | None:
        """The document with this digest; None if it is missing or damaged."""
        path = self._path(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            data = b""
        if manifest.digest(data) == digest:
            return data
        self._sizes.pop(path.name, None)
        return None

    def has(self, data: bytes) -> bool:
        return self._path(manifest.digest(data)).name in self._sizes

    def put(self, data: bytes) -> None:
        """Store a document; it is durable after the next sync of the file system. Raises `ResourceExhausted`."""
        path = self._path(manifest.digest(data))
        disk_reserve.require_space(self._directory, len(data))
        files.write_atomic(str(path), data, mode=0o600, sync=False)
        self._sizes[path.name] = len(data)

    def drop_damaged(self) -> None:
        """Remove what is not what its name says, as a power loss may leave it; the next pull fetches it again."""
        for name in list(self._sizes):
            path = self._directory / name
            try:
                is_whole = path.is_dir() or manifest.digest(path.read_bytes()) == f"sha256:{name}"
            except OSError:
                is_whole = False
            if not is_whole:
                log.warning("%s: damaged, or incomplete; removed", path)
                path.unlink(missing_ok=True)
                del self._sizes[name]

    def keep(self, digests: Collection[str]) -> None:
        """Remove all documents but these."""
        wanted = {self._path(digest).name for digest in digests}
        for name in self._sizes.keys() - wanted:
            (self._directory / name).unlink(missing_ok=True)
            self._sizes.pop(name, None)  # a reader may have found it damaged

    def _path(self, digest: str) -> Path:
        return self._directory / digest.removeprefix("sha256:")


def sync_file_system(directory: Path) -> None:
    """Return once all that was written to a directory's file system would survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syscalls.syncfs(descriptor)
    finally:
        os.close(descriptor)
