"""Operations on files: atomic replacement, durable directories, removal of trees whose content is not trusted.

They use the standard library alone; what needs newer kernel calls is in `nodeagent.linux`. An `OSError` has the path.
"""

import errno
import os
import stat

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

# The umask of every process of the agent: what others are to see is given its mode explicitly.
UMASK = 0o077

# The depth to which a tree is removed directly; each level keeps two descriptors open.
_MAX_DEPTH = 64


def ensure_directory(path: str, mode: int = 0o755) -> None:
    """Make `path` a directory, with its parents; one that is already there keeps its mode.

    A new one gets exactly `mode`, its parents what the umask leaves.
    Raises `NotADirectoryError` where something else, or a link, has the name.
    """
    try:
        _make_if_absent(path, mode)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        _make_if_absent(path, mode)


def _make_if_absent(path: str, mode: int) -> None:
    try:
        os.mkdir(path, mode)
    except FileExistsError:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise _error(errno.ENOTDIR, path) from None
    else:
        os.chmod(path, mode)


def narrow(path: str, mode: int) -> None:
    """Take all permissions that are not in `mode` from the file `path`. Does nothing where there is none.

    A link has none, and is not followed: it may be somebody else's.
    """
    try:
        place = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        status = os.fstat(place)
        found = stat.S_IMODE(status.st_mode)
        if found & ~mode and not stat.S_ISLNK(status.st_mode):
            os.chmod(f"/proc/self/fd/{place}", found & mode)
    finally:
        os.close(place)


def read_bounded(path: str, limit: int) -> bytes:
    """The content of the regular file `path`, at most `limit` bytes; never waits for a writer.

    Raises `OSError`: EINVAL where something else has the name, EFBIG where it is larger.
    """
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        data = b""
        while chunk := os.read(file, limit + 1 - len(data)):
            data += chunk
    finally:
        os.close(file)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit} bytes", path)
    return data


def sync_directory(path: str) -> None:
    """Make the names in the directory `path` durable."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_atomic(path: str, data: bytes, mode: int = 0o644, sync: bool = True) -> None:
    """Replace the file `path`: a reader, and with `sync` a crash, sees old content or new content.

    The file gets exactly `mode`, whatever the umask.
    """
    directory, name = os.path.split(path)
    temporary = os.path.join(directory, f".{name}.{os.urandom(6).hex()}")
    try:
        # The data are durable before the name: after a crash a file system may have the rename without them.
        _write_new(temporary, data, mode, sync)
        os.rename(temporary, path)
    except BaseException:
        _unlink_if_present(temporary)
        raise
    if sync:
        sync_directory(directory or ".")


def _write_new(path: str, data: bytes, mode: int, sync: bool) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        os.fchmod(file, mode)
        view = memoryview(data)
        while view:
            view = view[os.write(file, view) :]
        if sync:
            os.fsync(file)
    finally:
        os.close(file)


def _unlink_if_present(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def remove_tree(path: str) -> None:
    """Remove `path` and everything below it. Succeeds where there is nothing.

    Links are removed, never followed, and no mount is ever entered: a mount point inside, or `path` itself if it is
    one, stays with all that it holds. Everything that can be removed is; then the first obstacle is raised with its
    path. Depth, number and length of names do not matter. What others remove meanwhile counts as removed.
    """
    parent_path, name = os.path.split(path.rstrip("/"))
    if name in ("", ".", ".."):
        raise _error(errno.EINVAL, path)
    try:
        parent = os.open(parent_path or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        _Removal(_mount_id(parent)).run(parent, name, path)
    finally:
        os.close(parent)


class _Removal:
    """A walk over one tree by descriptors, each opened relative to its parent's.

    Directories below `_MAX_DEPTH` are first renamed into the tree's top directory, so that neither
    the stack nor the number of open descriptors grows with the depth.
    """

    def __init__(self, mount: str) -> None:
        self.mount = mount
        self.top = -1
        self.moved: list[str] = []
        self.obstacle: OSError | None = None

    def run(self, parent: int, name: str, path: str) -> None:
        self._remove(parent, name, path, 0)
        if self.obstacle is not None:
            raise self.obstacle

    def _remove(self, directory: int, name: str, path: str, depth: int) -> None:
        try:
            self._remove_any(directory, name, path, depth)
        except FileNotFoundError:
            pass
        except OSError as error:
            self.obstacle = self.obstacle or _error(error.errno or errno.EIO, path)

    def _remove_any(self, directory: int, name: str, path: str, depth: int) -> None:
        try:
            os.unlink(name, dir_fd=directory)
        except IsADirectoryError:
            self._remove_directory(directory, name, path, depth)

    def _remove_directory(self, directory: int, name: str, path: str, depth: int) -> None:
        # A mount point fails here with EBUSY, before anything that is mounted on it is touched.
        if _rmdir_if_empty(directory, name):
            return
        if depth == _MAX_DEPTH:
            self._move_to_top(directory, name)
            return
        child = os.open(name, _DIRECTORY, dir_fd=directory)
        try:
            self._empty(child, path, depth)
        finally:
            os.close(child)
        os.rmdir(name, dir_fd=directory)

    def _empty(self, directory: int, path: str, depth: int) -> None:
        if _mount_id(directory) != self.mount:
            raise _error(errno.EBUSY, path)
        if depth == 0:
            self.top = directory
        with os.scandir(directory) as entries:
            for entry in entries:
                self._remove(directory, entry.name, f"{path}/{entry.name}", depth + 1)
        while depth == 0 and self.moved:
            name = self.moved.pop()
            self._remove(directory, name, f"{path}/{name}", 1)

    def _move_to_top(self, directory: int, name: str) -> None:
        moved = f".removed-{os.urandom(8).hex()}"
        os.rename(name, moved, src_dir_fd=directory, dst_dir_fd=self.top)
        self.moved.append(moved)


def _rmdir_if_empty(directory: int, name: str) -> bool:
    try:
        os.rmdir(name, dir_fd=directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _mount_id(descriptor: int) -> str:
    """The id of the mount that an open file was reached through (mnt_id in proc_pid_fdinfo(5))."""
    with open(f"/proc/self/fdinfo/{descriptor}") as info:
        return next(line for line in info if line.startswith("mnt_id:"))


def _error(number: int, path: str) -> OSError:
    return OSError(number, os.strerror(number), path)
