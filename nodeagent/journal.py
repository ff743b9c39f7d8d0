"""The journal: changes of the store that are not in its database yet, in files that no disk holds up.

They are in the state directory, which is in memory on every node that has /run: a change is there before its caller
goes on, so that an agent that is killed loses none, while the database below the root directory is written later, by
whoever empties the journal. What a power loss takes with the journal are the changes of the last moment.

Two files take turns. One of them takes what comes; the other one is complete, and waits until all that it has is in the
database, or is empty. Both have their room from the start: what is stopped and removed must be written on a full /run.
Their numbers tell which one is the older, and tell an entry from what an earlier use of the file has left behind it:
an entry counts if it has its file's number, and is whole.

An entry of an earlier boot does not count, where the state directory is on a disk: a power loss may bring it back when
all that followed it is in the database, and images that were synced would be taken back.
"""

import errno
import functools
import logging
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Self

from nodeagent.errors import IncompatibleVersion, ResourceExhausted

log = logging.getLogger(__name__)

NAMES = ("journal.0", "journal.1")

_MODE = 0o600
_ROOM_BYTES = 512 << 10
_FORMAT = b"nodeagent journal"
_VERSION = 1
_HEADER = struct.Struct("<17sBQ")  # format, version, number
_ENTRY = struct.Struct("<QII")  # number of the file, length and checksum of what follows
# Whoever has the state directory as a volume may have put something else in the place of a file.
_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class _File:
    """A file of entries. number: of its present use, 0 before the first one. end: where the next entry begins."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.number = 0
        self.end = _HEADER.size
        self._descriptor = descriptor

    @property
    def is_empty(self) -> bool:
        return self.end == _HEADER.size

    def entries(self) -> Iterator[bytes]:
        """Read the file from its beginning; `number` and `end` are known when this has ended."""
        data = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)
        self.number, self.end = _number(self.path, data), _HEADER.size
        while self.number and (entry := _entry(data, self.end, self.number)) is not None:
            self.end += _ENTRY.size + len(entry)
            yield entry

    def read_number(self) -> int:
        return _number(self.path, os.pread(self._descriptor, _HEADER.size, 0))

    def begin(self, number: int) -> None:
        """Forget all entries: they have another number. More than its room is given back, to others who need memory."""
        self._write(_HEADER.pack(_FORMAT, _VERSION, number), 0)
        self.number, self.end = number, _HEADER.size
        with suppress(OSError):
            if os.fstat(self._descriptor).st_size > _ROOM_BYTES:
                os.ftruncate(self._descriptor, _ROOM_BYTES)

    def append(self, entry: bytes) -> None:
        head = _ENTRY.pack(self.number, len(entry), _checksum(entry))
        self._write(head + entry, self.end)
        self.end += len(head) + len(entry)

    def make_room(self) -> None:
        try:
            os.posix_fallocate(self._descriptor, 0, _ROOM_BYTES)
        except OSError as error:
            log.warning("%s: no room is kept for it: %s", self.path, error.strerror)

    def close(self) -> None:
        os.close(self._descriptor)

    def _write(self, data: bytes, at: int) -> None:
        try:
            written = os.pwrite(self._descriptor, data, at)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _full(self.path) from None
            raise OSError(error.errno, os.strerror(error.errno or 0), str(self.path)) from None
        if written < len(data):
            raise _full(self.path)


class Journal:
    """The two files of a directory. An entry is bytes; all of it survives the agent's end, or nothing of it.

    earlier: what another agent has left, the entries of the complete file and of the one that took what came.
    """

    def __init__(self, complete: _File, current: _File) -> None:
        self._complete, self._current = complete, current
        self.earlier: tuple[list[bytes], list[bytes]] = ([], [])

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Open or make the files. Raises `IncompatibleVersion` for those of a later release."""
        with _opened(directory, os.O_RDWR | os.O_CREAT | _FLAGS) as (files, closing):
            entries = {file: list(file.entries()) for file in files}
            older, newer = _in_order(files)
            journal = cls(older, newer)
            journal.earlier = (entries[older], entries[newer])
            newest = max(file.number for file in files)
            for file in (newer, older):
                file.make_room()
                if file.is_empty:
                    newest += 1
                    file.begin(newest)
            closing.pop_all()
            return journal

    @property
    def size_bytes(self) -> int:
        return self._complete.end + self._current.end

    def append(self, entry: bytes) -> None:
        """Add an entry, as a whole or not at all. Raises `ResourceExhausted` where the directory is full."""
        self._current.append(entry)

    def turn(self) -> None:
        """What has come is complete; what comes goes to the other file, which must have been emptied."""
        self._complete, self._current = self._current, self._complete

    def empty(self) -> None:
        """All entries of the complete file are elsewhere."""
        self._complete.begin(max(self._complete.number, self._current.number) + 1)

    def forget(self) -> None:
        """Empty both files."""
        self.earlier = ([], [])
        self._current.begin(max(self._complete.number, self._current.number) + 1)
        self.empty()

    def remove(self) -> None:
        for file in (self._complete, self._current):
            file.path.unlink(missing_ok=True)

    def close(self) -> None:
        for file in (self._complete, self._current):
            file.close()


def read(directory: Path) -> list[bytes]:
    """The entries in a directory, the oldest first, while an agent may write; none where there are no files."""
    try:
        with _opened(directory, os.O_RDONLY | _FLAGS) as (files, _):
            entries = {file: list(file.entries()) for file in files}
            return [entry for file in _in_order(files) for entry in entries[file]]
    except FileNotFoundError:
        return []


def numbers(directory: Path) -> list[int]:
    """The numbers of the files, of which one changes whenever entries leave the journal; none where there are none."""
    try:
        with _opened(directory, os.O_RDONLY | _FLAGS) as (files, _):
            return [file.read_number() for file in files]
    except FileNotFoundError:
        return []


def _in_order(files: Sequence[_File]) -> tuple[_File, _File]:
    """The file that is complete, and the one that takes what comes: it is the empty one, or the later one."""
    older, newer = sorted(files, key=lambda file: (file.is_empty, file.number))
    return older, newer


@contextmanager
def _opened(directory: Path, flags: int) -> Iterator[tuple[list[_File], ExitStack]]:
    """Both files, and what closes them on leaving, unless that is taken from it."""
    with ExitStack() as closing:
        files = []
        for path in (directory / name for name in NAMES):
            files.append(_File(path, os.open(path, flags, _MODE)))
            closing.callback(files[-1].close)
        yield files, closing


def _number(path: Path, data: bytes) -> int:
    """The number of a file with this content; 0 where it has none."""
    if len(data) < _HEADER.size or not any(data[: _HEADER.size]):
        return 0  # made, and given room
    form, version, number = _HEADER.unpack_from(data)
    if form != _FORMAT:
        log.error("%s: is not a journal; what it had is lost", path)
        return 0
    if version > _VERSION:
        raise IncompatibleVersion(
            f"{path}: version {version} is newer than {_VERSION}, the newest that this release understands; "
            "install the release of the agent that wrote it"
        )
    return int(number)


def _entry(data: bytes, at: int, number: int) -> bytes | None:
    """The entry of a file that begins there; None at the end."""
    if at + _ENTRY.size > len(data):
        return None
    of, length, checksum = _ENTRY.unpack_from(data, at)
    entry = data[at + _ENTRY.size : at + _ENTRY.size + length]
    return entry if of == number and _checksum(entry) == checksum and len(entry) == length else None


def _checksum(entry: bytes) -> int:
    """The CRC of the name of this boot and the entry."""
    return zlib.crc32(entry, zlib.crc32(_boot()))


@functools.cache
def _boot() -> bytes:
    return Path("/proc/sys/kernel/random/boot_id").read_bytes()


def _full(path: Path) -> Exception:
    return ResourceExhausted(f"{path}: no space is left in {path.parent}; free some there")
