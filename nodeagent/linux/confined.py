"""Paths below a root directory whose content is not trusted.

No path leads out of the root, whatever links, ".." or renames are in the way, and while others change the tree: a path
is walked once, to a descriptor, and all further work is done on the descriptor. Absolute links and ".." mean what they
would mean to a process with this root directory. Links of procfs to open files are not followed.
"""

import errno
import os
import stat

from nodeagent.linux import syscalls

_INSIDE = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
_UNFOLLOWED = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_LINKS = 40  # as in path_resolution(7)


def open_path(root: int, path: str, flags: int = os.O_PATH, *, follow: bool = True) -> int:
    """Open what `path` names inside `root`; without `follow`, no link may occur anywhere in it."""
    resolve = _INSIDE if follow else _INSIDE | syscalls.RESOLVE_NO_SYMLINKS
    return syscalls.openat2(root, path, flags, resolve=resolve)


def own_descriptors() -> int:
    """Open /proc/self/fd for `open_again`, which then works even where another mount has covered it meanwhile."""
    directory = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    if syscalls.statfs_type(directory) != syscalls.PROC_SUPER_MAGIC:
        os.close(directory)
        raise OSError(errno.EXDEV, "not a directory of procfs", "/proc/self/fd")
    return directory


def open_again(own: int, descriptor: int, flags: int) -> int:
    """Open for use the very file that an O_PATH descriptor stands for, after it was checked.

    open(2) has effects: a tape rewinds, a watchdog starts, a FIFO waits. own: from `own_descriptors`.
    """
    return os.open(str(descriptor), flags | os.O_CLOEXEC, dir_fd=own)


def make_path(
    root: int, path: str, *, directory: bool, follow: bool = True, alone: bool = False
) -> int:
    """Open (O_PATH) a directory or a file inside `root`; missing parts of the path are made.

    The target of a dangling link is made. New directories have mode 755, files are empty.
    alone: no other process changes the tree, so that directories can be given their mode whatever the umask.
    """
    try:
        return open_path(root, path, follow=follow)
    except FileNotFoundError:
        pass
    made = _make_last(root, path, directory, follow, alone)
    if made >= 0:
        return made
    return _Walk(root, path, _MAX_LINKS if follow else 0, alone).run(directory)


def _make_last(root: int, path: str, directory: bool, follow: bool, alone: bool) -> int:
    """Make the last name, which alone is missing most often, in one step; -1 where more is missing."""
    above, name = os.path.split(path)
    if name in ("", ".", ".."):
        return -1
    try:
        parent = open_path(root, above or ".", follow=follow)
    except FileNotFoundError:
        return -1
    try:
        _make(parent, name, directory, alone)
        made = os.open(name, _UNFOLLOWED, dir_fd=parent)
    finally:
        os.close(parent)
    if stat.S_ISLNK(os.fstat(made).st_mode):
        os.close(made)
        return -1
    return made


class _Walk:
    """A walk component by component; `trail` has the directories from the root to the current one."""

    def __init__(self, root: int, path: str, links: int, alone: bool) -> None:
        self.path = path
        self.links = links
        self.alone = alone
        self.trail = [os.dup(root)]
        self.pending = _components(path)

    def run(self, directory: bool) -> int:
        try:
            while self.pending:
                name = self.pending.pop()
                if name == "..":
                    self._go_up_to(max(len(self.trail) - 1, 1))
                else:
                    self._go_down(name, directory or bool(self.pending))
            return self.trail.pop()
        finally:
            self._go_up_to(0)

    def _go_down(self, name: str, directory: bool) -> None:
        step = _open_or_make(self.trail[-1], name, directory, self.alone)
        self.trail.append(step)
        if stat.S_ISLNK(os.fstat(step).st_mode):
            self._follow(os.readlink("", dir_fd=step))

    def _follow(self, link: str) -> None:
        self.links -= 1
        if self.links < 0:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), self.path)
        self._go_up_to(1 if link.startswith("/") else len(self.trail) - 1)
        self.pending += _components(link)

    def _go_up_to(self, depth: int) -> None:
        while len(self.trail) > depth:
            os.close(self.trail.pop())


def _components(path: str) -> list[str]:
    """The names in a path, last first."""
    return [name for name in reversed(path.split("/")) if name not in ("", ".")]


def _open_or_make(directory: int, name: str, as_directory: bool, alone: bool) -> int:
    try:
        return os.open(name, _UNFOLLOWED, dir_fd=directory)
    except FileNotFoundError:
        _make(directory, name, as_directory, alone)
        return os.open(name, _UNFOLLOWED, dir_fd=directory)


def _make(directory: int, name: str, as_directory: bool, alone: bool) -> None:
    try:
        if as_directory:
            os.mkdir(name, 0o755, dir_fd=directory)
            if alone:  # else the name may be a link by now, which chmod would follow
                os.chmod(name, 0o755, dir_fd=directory)
        else:
            os.mknod(name, stat.S_IFREG | 0o644, dir_fd=directory)
    except FileExistsError:
        pass  # made by another process meanwhile; the caller opens and checks it
