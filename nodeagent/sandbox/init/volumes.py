"""Volumes of an image: directories of the container's own, on the node, with what the image has at their place.

A volume is no part of the overlay: it can be written to where the root is read-only, and an overlay can be made of what
is in it. What is copied is the image's, before anything is mounted over it and before anybody runs in the container.
Nothing here follows a link, and one directory is open at a time, whatever the depth.

A copy takes no more of the disk than the image does: a file keeps its holes, of which a few bytes of a layer can make
a terabyte. An image may want many copies, of volumes in volumes; they leave the node its reserve.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from nodeagent import disk_reserve, files
from nodeagent.linux import confined, mounts

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_CHECK_BYTES = 4 << 20  # after which the free space is checked again
_ENTRY_BYTES = 4096  # a file or directory takes about a block besides its content
_OVERLAYS_OWN = "trusted."


def make(path: str) -> int:
    """A new directory as a detached mount of its own, which propagates nothing.

    What an earlier attempt to start has left there is removed.
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
    Raises ResourceExhausted at the node's reserve.
    """
    _Copy(source, volume).run()


class _Copy:
    """A copy of a directory. `_names`: the path of the first copy of a file with several names, by device and inode."""

    def __init__(self, source: int, target: int) -> None:
        self._source = source
        self._target = target
        self._names: dict[tuple[int, int], str] = {}
        self._unchecked = _CHECK_BYTES

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
        self._spend(_ENTRY_BYTES)
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
            self._copy_file(source, target, name)
        else:
            _copy_special(source, target, name, status)
        return False

    def _copy_file(self, source: int, target: int, name: str) -> None:
        read = os.open(name, _READ, dir_fd=source)
        try:
            write = os.open(name, _WRITE, 0o600, dir_fd=target)
            try:
                for start, end in _data(read):
                    self._copy_data(read, write, start, end)
                os.ftruncate(write, os.fstat(read).st_size)
                _copy_attributes(read, write)
            finally:
                os.close(write)
        finally:
            os.close(read)

    def _copy_data(self, read: int, write: int, start: int, end: int) -> None:
        os.lseek(write, start, os.SEEK_SET)
        while start < end:
            size = min(end - start, _CHECK_BYTES)
            self._spend(size)
            moved = os.sendfile(write, read, start, size)
            if not moved:
                return
            start += moved

    def _spend(self, size_bytes: int) -> None:
        """Count what is about to be written, and check from time to time that there is room for it."""
        self._unchecked += size_bytes
        if self._unchecked >= _CHECK_BYTES:
            self._unchecked = 0
            disk_reserve.require_space(self._target, _CHECK_BYTES)


@contextmanager
def _opened(root: int, path: str) -> Iterator[int]:
    directory = confined.open_path(root, path, _DIRECTORY, follow=False)
    try:
        yield directory
    finally:
        os.close(directory)


def _data(file: int) -> Iterator[tuple[int, int]]:
    """The ranges of a file that have data; what is between them is holes (lseek(2))."""
    end, size = 0, os.fstat(file).st_size
    while end < size:
        try:
            start = os.lseek(file, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return  # a hole up to the end
        end = os.lseek(file, start, os.SEEK_HOLE)
        yield start, end


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
    """Copy them with the owner first: a change of it clears set-user-ID bits and file capabilities (chown(2))."""
    status = os.fstat(source)
    os.fchown(target, status.st_uid, status.st_gid)
    os.fchmod(target, stat.S_IMODE(status.st_mode))
    for name in os.listxattr(source):
        if not name.startswith(_OVERLAYS_OWN):
            with suppress(OSError):  # one that the node's file system does not have
                os.setxattr(target, name, os.getxattr(source, name))
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
