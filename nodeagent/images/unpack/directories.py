"""The directories of a layer that is being unpacked, as descriptors below its root.

Paths are looked up with the layer's directory as the root directory (openat2(2), RESOLVE_IN_ROOT): links are followed,
and lead nowhere else. Missing directories are made.
"""

import errno
import os
from collections.abc import Callable

from nodeagent.images.unpack.whiteouts import is_whiteout, make_opaque
from nodeagent.linux import confined

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PATH = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_MAX_OPEN = 64
_MAX_REMEMBERED_BYTES = 64 << 20
_NOT_THERE = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP))


class Directories:
    """The directories. on_implied: called with the path of each one before it is made for an entry inside it."""

    def __init__(self, root: int, on_implied: Callable[[str], None]) -> None:
        self.root = root
        self._on_implied = on_implied
        self._open: dict[str, int] = {}
        self._times: dict[str, int] = {}
        self._remembered_bytes = 0

    def get(self, path: str) -> int:
        """A descriptor, valid until the next call; "" is the root."""
        if not path:
            return self.root
        descriptor = self._open.get(path)
        if descriptor is None:
            if len(self._open) >= _MAX_OPEN:
                self.close()
            descriptor = self._open[path] = self._open_or_make(path)
        return descriptor

    def set_time_later(self, path: str, mtime_ns: int) -> None:
        """Note the time of a directory, which is set when everything inside it has been made."""
        self._times[path] = mtime_ns
        self._remembered_bytes += memory_of(path)
        if self._remembered_bytes > _MAX_REMEMBERED_BYTES:
            self.set_times()  # what is still made inside changes them again: better than no bound

    def set_times(self) -> None:
        for path, mtime_ns in self._times.items():
            directory = open_existing(self.root, path)
            if directory is not None:
                os.utime(directory, ns=(mtime_ns, mtime_ns))
                os.close(directory)
        self._times.clear()
        self._remembered_bytes = 0

    def forget(self, kept: int = -1) -> None:
        """Close all descriptors but the one in use: a removed entry may have been on the path to any of them."""
        for path, descriptor in list(self._open.items()):
            if descriptor != kept:
                os.close(descriptor)
                del self._open[path]

    def close(self) -> None:
        self.forget()

    def _open_or_make(self, path: str) -> int:
        try:
            return confined.open_path(self.root, path, _PATH)
        except (FileNotFoundError, NotADirectoryError):
            self._make(path)
        return confined.open_path(self.root, path, _PATH)

    def _make(self, path: str) -> None:
        missing = []
        while (directory := self._existing(path)) is None:
            self._on_implied(path)
            missing.append(path)
            path = path.rpartition("/")[0]
        try:
            for below in reversed(missing):
                above, directory = directory, self._step_down(directory, below)
                os.close(above)
                os.chmod(f"/proc/self/fd/{directory}", 0o755)  # whatever the umask
        finally:
            os.close(directory)

    def _existing(self, path: str) -> int | None:
        try:
            return confined.open_path(self.root, path or ".", _PATH)
        except FileNotFoundError:
            return None
        except NotADirectoryError:
            return self._in_place_of_whiteout(path)

    def _in_place_of_whiteout(self, path: str) -> int | None:
        """Replace the whiteout at `path` by a directory that hides the same; None where the path ends before it."""
        try:
            parent, name = open_parent(self.root, path)
        except NotADirectoryError:
            return None
        try:
            if not is_whiteout(os.stat(name, dir_fd=parent, follow_symlinks=False)):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
            os.unlink(name, dir_fd=parent)
            directory = self._step_down(parent, path)
            os.chmod(f"/proc/self/fd/{directory}", 0o755)
            make_opaque(parent, name)
            return directory
        finally:
            os.close(parent)

    def _step_down(self, directory: int, path: str) -> int:
        """Make the last component of the path in `directory`, to which the rest of it leads."""
        name = path.rpartition("/")[2]
        try:
            os.mkdir(name, 0o755, dir_fd=directory)
        except FileExistsError:  # a dangling link
            return confined.make_path(self.root, path, directory=True, alone=True)
        return os.open(name, _PATH | os.O_NOFOLLOW, dir_fd=directory)


def open_existing(root: int, path: str) -> int | None:
    """Open a directory below `root` that is not a link itself; None where there is none."""
    try:
        return confined.open_path(root, path or ".", DIRECTORY)
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
        return None


def open_parent(root: int, path: str) -> tuple[int, str]:
    """Open the directory of a path's last component, which is not examined; return both."""
    parent, _, name = path.rpartition("/")
    return confined.open_path(root, parent or ".", _PATH), name


def memory_of(path: str) -> int:
    """The approximate memory in bytes that remembering a path takes."""
    return len(path) + 200
