"""The log file of a container, in the format of the CRI.

One line is ``2026-11-23T16:05:00.123456789Z stdout F text``: time, stream, a tag, and the text as it was written. A
text longer than MAX_LINE_BYTES is cut into parts with the tag P; its last part, and every other line, has F. P says
that no newline was written there, so that the end of an output without a newline has P as well: a reader of the log
gets back exactly what was written.
"""

import errno
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager

from nodeagent.errors import FailedPrecondition
from nodeagent.linux import confined

MAX_LINE_BYTES = 16384

_MODE = 0o640
# O_NONBLOCK: opening a FIFO without a reader fails with ENXIO instead of waiting for one (fifo(7)).
_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
# Errors that are the fault of a log's path: EEXIST where a link leads to nothing, ENOENT and EPERM in /proc and /sys.
_FAULTS_OF_A_LINK = {errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.EEXIST}
_FAULTS_OF_A_TREE = {errno.ENOENT, errno.EPERM, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG}
_FAULTS_OF_A_PLACE = _FAULTS_OF_A_LINK | _FAULTS_OF_A_TREE


# ---- the format ----


def format_lines(data: bytes, stamp: bytes, stream: bytes) -> tuple[bytes, bytes]:
    """The log's lines for `data`, and the rest of it: at most MAX_LINE_BYTES of a line that goes on."""
    full = b"%s %s F " % (stamp, stream)
    partial = b"%s %s P " % (stamp, stream)
    lines, newline, rest = data.rpartition(b"\n")
    if not newline:
        output = b""
    elif _has_long_line(lines):
        output = b"".join(_format_line(line, full, partial) for line in lines.split(b"\n"))
    else:
        output = full + lines.replace(b"\n", b"\n" + full) + b"\n"
    parts, rest = _cut(rest)
    return output + b"".join(b"%s%s\n" % (partial, part) for part in parts), rest


def format_end(rest: bytes, stamp: bytes, stream: bytes) -> bytes:
    """The last line of a stream, which lacks its newline: a part of a line that is never continued."""
    return b"%s %s P %s\n" % (stamp, stream, rest) if rest else b""


def _has_long_line(lines: bytes) -> bool:
    """Whether a line is too long for one entry; it looks at one newline for each MAX_LINE_BYTES, not at all of them."""
    start = 0
    while len(lines) - start > MAX_LINE_BYTES:
        newline = lines.rfind(b"\n", start, start + MAX_LINE_BYTES + 1)
        if newline < 0:
            return True
        start = newline + 1
    return False


def _format_line(line: bytes, full: bytes, partial: bytes) -> bytes:
    parts, last = _cut(line)
    return b"".join(b"%s%s\n" % (partial, part) for part in parts) + b"%s%s\n" % (full, last)


def _cut(text: bytes) -> tuple[list[bytes], bytes]:
    """Cut a text into parts of the greatest length, and a last one, which is only empty if the text is."""
    last = max(0, len(text) - 1) // MAX_LINE_BYTES * MAX_LINE_BYTES
    return [text[i : i + MAX_LINE_BYTES] for i in range(0, last, MAX_LINE_BYTES)], text[last:]


class Clock:
    """Stamps in the format of RFC 3339, in UTC with nanoseconds, that never run backwards."""

    def __init__(self) -> None:
        self._last_ns = 0
        self._second = -1
        self._prefix = ""

    def stamp(self) -> bytes:
        self._last_ns = max(self._last_ns, time.time_ns())
        second, fraction = divmod(self._last_ns, 1_000_000_000)
        if second != self._second:
            self._second = second
            self._prefix = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return b"%s.%09dZ" % (self._prefix.encode(), fraction)


# ---- the file ----


class LogFile:
    """The log at `path`, to which whole lines are appended. What cannot be written is dropped and counted.

    root: a directory above it, below which no link is followed; by default the one that it is in.
    """

    def __init__(self, path: str, root: str = "") -> None:
        self.path = path
        self.dropped_lines = 0
        self._root = root or os.path.dirname(path)
        self._file = _open(path, self._root)

    def write(self, lines: bytes) -> None:
        written = 0
        try:
            while written < len(lines):
                written += os.write(self._file, lines[written:] if written else lines)
        except OSError:
            self.dropped_lines += lines.count(b"\n", written)
            self._cut_off(written - (lines.rfind(b"\n", 0, written) + 1))

    def _cut_off(self, torn_bytes: int) -> None:
        """Remove the part of a line that a full disk left at the end of the file."""
        if torn_bytes:
            os.ftruncate(self._file, self.size() - torn_bytes)

    def size(self) -> int:
        return os.fstat(self._file).st_size

    def inode(self) -> int:
        return os.fstat(self._file).st_ino

    def truncate(self, size: int) -> None:
        os.ftruncate(self._file, size)

    def reopen(self) -> None:
        """Go on in a new file of the same name; with an error, in the old one."""
        # Opened before the old one is closed: no moment is without a log, and after an error the old one goes on.
        new = _open(self.path, self._root)
        os.close(self._file)
        self._file = new

    def close(self) -> None:
        os.close(self._file)


class Unopened:
    """In place of a log that cannot be opened: keeps what would be written to it, and counts what is dropped.

    room_bytes: how much it keeps.
    """

    def __init__(self, room_bytes: int) -> None:
        self.dropped_lines = 0
        self.kept: list[bytes] = []
        self._room_bytes = room_bytes

    def write(self, lines: bytes) -> None:
        if len(lines) <= self._room_bytes:
            self._room_bytes -= len(lines)
            self.kept.append(lines)
        else:
            self._room_bytes = -1  # nothing after a gap
            self.dropped_lines += lines.count(b"\n")

    def size(self) -> int:
        return 0

    def inode(self) -> int:
        return 0  # no file has this number

    def truncate(self, size: int) -> None:
        """Do nothing: there is no file."""

    def reopen(self) -> None:
        """Do nothing: there is no file."""

    def close(self) -> None:
        """Do nothing: there is no file."""


def _open(path: str, root: str) -> int:
    """Open a log. A container may share the directory: links are not followed there, and pipes not waited for."""
    try:
        with _directories_for_others():
            file = _open_below(root, path.removeprefix(f"{root}/"))
    except OSError as error:
        if error.errno in _FAULTS_OF_A_PLACE:
            raise FailedPrecondition(f"log {path}: {os.strerror(error.errno)}") from error
        raise
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise FailedPrecondition(f"log {path}: not a regular file")
    return file


@contextmanager
def _directories_for_others() -> Iterator[None]:
    """Have directories made with mode 755, as log collectors need not be root."""
    old = os.umask(0o022)
    try:
        yield
    finally:
        os.umask(old)


def _open_root(root: str) -> int:
    try:
        return os.open(root, _DIRECTORY)
    except FileNotFoundError:
        os.makedirs(root, exist_ok=True)
        return os.open(root, _DIRECTORY)


def _open_below(root: str, path: str) -> int:
    above, _, name = path.rpartition("/")
    top = _open_root(root)
    try:
        directory = confined.make_path(top, above or ".", directory=True, follow=False)
    finally:
        os.close(top)
    try:
        file = os.open(name, _FLAGS | os.O_EXCL, _MODE, dir_fd=directory)
        os.fchmod(file, _MODE)
    except FileExistsError:
        file = _open_existing(name, directory)
    finally:
        os.close(directory)
    return file


def _open_existing(name: str, directory: int) -> int:
    """Open an existing log. One with further hard links is replaced: it may be a link to somebody else's file."""
    file = os.open(name, _FLAGS, dir_fd=directory)
    if os.fstat(file).st_nlink > 1:
        os.close(file)
        os.unlink(name, dir_fd=directory)
        file = os.open(name, _FLAGS | os.O_EXCL, _MODE, dir_fd=directory)
    return file
