"""Volumes of an image: directories of the container's own, on the node, with what the image has at their place.

A volume is no part of the overlay: it can be written to where the root is read-only, and an overlay can be made of what
is in it. What is copied is the image's, before anything is mounted over it and before anybody runs in the container.
Nothing here follows a link, and one directory is open at a time, whatever the depth.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from nodeagent import files
from nodeagent.linux import confined, mounts

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_CHUNK_BYTES = 1 << 30  # of sendfile(2), which moves 2 GiB at most
_OVERLAYS_OWN = "trusted."


def make(path: str) -> int:
    """A new directory as a detached mount of its own, which propagates nothing.

    What a start that is repeated finds of the one before goes.
    """
    files.ensure_directory(os.path.dirname(path), 0o700)
    files.remove_tree(path)
    os.mkdir(path, 0o700)
    directory = os.open(path, _DIRECTORY)
    tree = mounts.clone_tree(directory, recursive=False)
    os.close(directory)
    mounts.set_propagation(tree, "private")
    return tree


def fill(volume: int, source: int) -> None:
    """Copy a directory of the image: owners, modes, times, extended attributes and names of a file stay as they are.

    volume: an empty directory. Owners are those on the node, as the files of the container's own layer have them.
    """
    _Copy(source, volume).run()


class _Copy:
    """names: where a file with several names has been copied to, by device and inode."""

    def __init__(self, source: int, target: int) -> None:
        self._source = source
        self._target = target
        self._names: dict[tuple[int, int], str] = {}

    def run(self) -> None:
        directories = ["."]
        for path in directories:  # which grows
            with _opened(self._source, path) as source, _opened(self._target, path) as target:
                names = os.listdir(source)
                found = [name for name in names if self._copy(source, target, path, name)]
            directories += [f"{path}/{name}" for name in found]
        for path in reversed(directories):  # their times are those of the last change in them
            with _opened(self._source, path) as source, _opened(self._target, path) as target:
                _copy_attributes(source, target)

    def _copy(self, source: int, target: int, parent: str, name: str) -> bool:
        """Copy all but the content of a directory, for which it returns True."""
        status = os.stat(name, dir_fd=source, follow_symlinks=False)
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFDIR:
            os.mkdir(name, 0o700, dir_fd=target)
            return True
        path = f"{parent}/{name}"
        first = path
        if status.st_nlink > 1:
            first = self._names.setdefault((status.st_dev, status.st_ino), path)
        if first != path:
            os.link(first, name, src_dir_fd=self._target, dst_dir_fd=target, follow_symlinks=False)
        elif kind == stat.S_IFREG:
            _copy_file(source, target, name)
        else:
            _copy_special(source, target, name, status)
        return False


@contextmanager
def _opened(root: int, path: str) -> Iterator[int]:
    directory = confined.open_path(root, path, _DIRECTORY, follow=False)
    try:
        yield directory
    finally:
        os.close(directory)


def _copy_file(source: int, target: int, name: str) -> None:
    read = os.open(name, _READ, dir_fd=source)
    try:
        write = os.open(name, _WRITE, 0o600, dir_fd=target)
        try:
            while os.sendfile(write, read, None, _CHUNK_BYTES):
                pass
            _copy_attributes(read, write)
        finally:
            os.close(write)
    finally:
        os.close(read)


def _copy_special(source: int, target: int, name: str, status: os.stat_result) -> None:
    """A link, a pipe, a socket or a device; the cgroup decides about the latter, as it does in the image."""
    if stat.S_ISLNK(status.st_mode):
        os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
    else:
        os.mknod(name, status.st_mode, status.st_rdev, dir_fd=target)
    os.chown(name, status.st_uid, status.st_gid, dir_fd=target, follow_symlinks=False)
    times = (status.st_atime_ns, status.st_mtime_ns)
    os.utime(name, ns=times, dir_fd=target, follow_symlinks=False)


def _copy_attributes(source: int, target: int) -> None:
    """The owner first: with another one, set-user-ID bits and capabilities go."""
    status = os.fstat(source)
    os.fchown(target, status.st_uid, status.st_gid)
    os.fchmod(target, stat.S_IMODE(status.st_mode))
    for name in os.listxattr(source):
        if not name.startswith(_OVERLAYS_OWN):
            with suppress(OSError):  # one that the node's file system has not got
                os.setxattr(target, name, os.getxattr(source, name))
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
