"""What an unpacked layer looks like, as one digest: to tell later whether it is still what was unpacked.

It covers the name, kind, mode, owner, size, time, device and link target of every entry; not extended attributes, and
not the content of files: to hash that would read a layer again which was just written. A file that was cut, emptied,
replaced or written to by others differs by its size or time; a block that a disk returns wrongly does not.
"""

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

_CHUNK_BYTES = 1 << 20
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def digest(directory: Path) -> str:
    """The digest of the tree, ``sha256:…``. It takes some 10 µs for each entry."""
    hashed = hashlib.sha256()
    for path, parent, name, status in _walk(directory):
        hashed.update(path + b"\0" + _described(parent, name, status) + b"\0")
    return f"sha256:{hashed.hexdigest()}"


def read(directory: Path) -> None:
    """Read every file of the tree. Raises `OSError` for the first one that the disk does not return."""
    for path, parent, name, status in _walk(directory):
        if stat.S_ISREG(status.st_mode):
            try:
                _read(parent, name)
            except OSError as error:
                raise OSError(error.errno, error.strerror, os.fsdecode(path)) from None


def _walk(directory: Path) -> Iterator[tuple[bytes, int, bytes, os.stat_result]]:
    """All entries and the top: path below it, descriptor of the directory, name there, status.

    The order depends on the names alone. A path is opened from the top, where it is as long as a layer may have it.
    """
    top = os.open(directory, _DIRECTORY)
    try:
        yield b"", top, b".", os.fstat(top)
        waiting = [b"."]
        while waiting:
            parent = waiting.pop()
            opened = os.open(parent, _DIRECTORY, dir_fd=top)
            try:
                for name in sorted(map(os.fsencode, os.listdir(opened))):
                    path = name if parent == b"." else parent + b"/" + name
                    status = os.stat(name, dir_fd=opened, follow_symlinks=False)
                    yield path, opened, name, status
                    if stat.S_ISDIR(status.st_mode):
                        waiting.append(path)
            finally:
                os.close(opened)
    finally:
        os.close(top)


def _described(parent: int, name: bytes, status: os.stat_result) -> bytes:
    mode = status.st_mode
    size = (
        status.st_size if stat.S_ISREG(mode) else 0
    )  # of a directory it depends on the file system
    device = status.st_rdev if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else 0
    facts = f"{mode:o} {status.st_uid} {status.st_gid} {size} {int(status.st_mtime)} {device} "
    return facts.encode() + (os.readlink(name, dir_fd=parent) if stat.S_ISLNK(mode) else b"")


def _read(parent: int, name: bytes) -> None:
    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        while os.read(file, _CHUNK_BYTES):
            pass
    finally:
        os.close(file)
