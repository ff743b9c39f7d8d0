"""Making and removing groups in one hierarchy, and telling the agent's groups from those of others.

A group that the agent makes carries an extended attribute, so that this is known after a restart as well. mkdir(2) can
give it none, and the agent may be killed before it does: until then the sticky bit, which means nothing to a group,
says that it is ours. Nothing is ever removed but by rmdir(2), which refuses a group that has processes.
"""

import errno
import os
import stat
import time
from collections.abc import Iterator

from nodeagent.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound

MARK = "trusted.nodeagent"
GROUP = b"group"
"""Made for a container, an exec or a part of the agent: the agent may kill and remove what is in it."""
PARENT = b"parent"
"""Made because it was missing: removed as soon as it is empty, never killed, because others may use it as well."""
UNFINISHED = b""
"""Not marked yet, or never where the agent was killed: it has no processes of the agent's."""

# A parent that exists can be removed, with its last child, before the next step is made.
_ATTEMPTS = 10

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_GONE = frozenset(
    (errno.ENOENT, errno.ENODEV)
)  # ENODEV: from the open file of a group that was removed (kernfs)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.0005, 0.05


def make(mount: str, path: str) -> None:
    """Make the group `path`, and its parents as needed. Raises AlreadyExists."""
    for _ in range(_ATTEMPTS):
        try:
            _make_marked(mount + path, GROUP)
            return
        except FileNotFoundError:
            _make_parents(mount, path)
        except FileExistsError:
            raise AlreadyExists(f'cgroup "{path}": exists already in {mount}') from None
        except NotADirectoryError:
            raise InvalidArgument(f'cgroup "{path}": a control file has this name') from None
    raise FailedPrecondition(f'cgroup "{path}": its parents are being removed')


def make_in(mount: str, path: str) -> None:
    """Make the group `path` in one that exists. Raises AlreadyExists, and NotFound without that one."""
    try:
        _make_marked(mount + path, GROUP)
    except FileExistsError:
        raise AlreadyExists(f'cgroup "{path}": exists already in {mount}') from None
    except FileNotFoundError:
        raise NotFound(f'cgroup "{os.path.dirname(path)}": does not exist') from None


def _make_parents(mount: str, path: str) -> None:
    for parent in ancestors(path):
        try:
            _make_marked(mount + parent, PARENT)
        except (FileExistsError, FileNotFoundError):
            continue


def _make_marked(directory: str, kind: bytes) -> None:
    os.mkdir(directory, 0o755 | stat.S_ISVTX)
    try:
        os.setxattr(directory, MARK, kind)
        os.chmod(directory, 0o755)  # whatever the umask: its container sees it at /sys/fs/cgroup
    except FileNotFoundError:
        raise  # removed meanwhile as an empty parent; what has the name now, if anything, was made by others
    except BaseException:
        _rmdir(directory)
        raise


def ancestors(path: str) -> list[str]:
    """The groups above `path` without the root, uppermost first."""
    names = path.split("/")[1:-1]
    return ["/" + "/".join(names[: depth + 1]) for depth in range(len(names))]


def kind(directory: str) -> bytes | None:
    """The kind of a group: GROUP, PARENT or UNFINISHED if the agent made it, None if others did or there is none."""
    try:
        mode = os.stat(
            directory
        ).st_mode  # before the mark: a group is marked before it loses the sticky bit
        return os.getxattr(directory, MARK)
    except NotADirectoryError:  # below a control file
        return None
    except OSError as error:
        if error.errno in _GONE:
            return None
        if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
            raise
    return UNFINISHED if mode & stat.S_ISVTX else None


def bottom_up(directory: str) -> Iterator[tuple[int, str]]:
    """Walk `directory` and all groups below it, each after those inside it, as a name in an open directory.

    A container may nest groups deeper than a path can be long, and than there are descriptors: one is open at a time,
    and the way up is "..". Yields nothing where `directory` does not exist.
    """
    try:
        descriptor = os.open(os.path.dirname(directory), _DIRECTORY)
    except FileNotFoundError:
        return
    entered: list[str] = []  # the way from the top to the open directory
    waiting = [[os.path.basename(directory)]]  # at each level of it, what is still to be entered
    try:
        while True:
            if waiting[-1]:
                name = waiting[-1].pop()
                if (inside := _enter(descriptor, name)) is not None:
                    descriptor = inside
                    entered.append(name)
                    waiting.append(_groups_in(descriptor))
                continue
            waiting.pop()
            if not waiting or (above := _enter(descriptor, "..")) is None:
                return
            descriptor = above
            yield descriptor, entered.pop()
    finally:
        os.close(descriptor)


def _enter(descriptor: int, name: str) -> int | None:
    """Open a directory and close `descriptor` for it; None, which leaves that open, for a removed one."""
    try:
        inside = os.open(name, _DIRECTORY, dir_fd=descriptor)
    except OSError as error:
        if error.errno not in _GONE:
            raise
        return None
    os.close(descriptor)
    return inside


def _groups_in(descriptor: int) -> list[str]:
    try:
        with os.scandir(descriptor) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError as error:
        if error.errno not in _GONE:
            raise
        return []


def groups_in(directory: str) -> list[str]:
    """The names of the groups in a group; none of one that does not exist."""
    try:
        descriptor = os.open(directory, _DIRECTORY)
    except OSError as error:
        if error.errno not in _GONE:
            raise
        return []
    try:
        return _groups_in(descriptor)
    finally:
        os.close(descriptor)


def require_group(mount: str, path: str, fence: str) -> None:
    """Raise FailedPrecondition for a group that exists and is not the agent's.

    fence: the group itself or, out of its container's sight, one above it that is that container's alone: a process
    with SYS_ADMIN can take the mark away from a group that it sees.
    """
    if kind(mount + path) in (GROUP, UNFINISHED) or not os.path.isdir(mount + path):
        return
    if fence == path or kind(mount + fence) is None:
        raise FailedPrecondition(
            f'cgroup "{path}": not made by this agent, left as it is (in {mount})'
        )


def remove(mount: str, path: str, fence: str, deadline: float) -> None:
    """Remove the group and all below it, also what a container made there. Succeeds where there is none.

    Processes that were killed may not have ended yet: waits for them until `deadline` (of time.monotonic). Raises
    FailedPrecondition where some stay, and for a group that others made. fence: see `require_group`.
    """
    require_group(mount, path, fence)
    if _rmdir(mount + path):
        return
    pause = _FIRST_PAUSE_S
    while reason := _remove_all(mount + path):
        if time.monotonic() >= deadline:
            raise FailedPrecondition(f'cgroup "{path}": not removed, {reason}')
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def _remove_all(directory: str) -> str:
    """Remove all that can be removed; return the reason why a part of it stays, or ""."""
    reason = ""
    for parent, name in bottom_up(directory):
        if not _rmdir(name, parent):
            reason = reason or _reason(name, parent)
    return reason


def _rmdir(directory: str, parent: int | None = None) -> bool:
    """Remove a group; False where processes or groups are in it."""
    try:
        os.rmdir(directory, dir_fd=parent)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def _reason(name: str, parent: int) -> str:
    try:
        pids = read(f"{name}/cgroup.procs", parent).split()
    except OSError:
        pids = []
    return f"processes {', '.join(pids[:10])} are in {name}" if pids else f"{name} is busy"


def read(path: str, parent: int | None = None) -> str:
    """Read a control file; `path` is relative to the open directory `parent`."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=parent)
    with open(file, encoding="ascii") as text:
        return text.read()


def remove_empty_parents(mount: str, path: str) -> None:
    """Remove the groups above `path` that the agent made because they were missing, as far as they are empty.

    One that has been removed already, as the kubelet removes all below a pod's group, does not protect those above it.
    """
    for parent in reversed(ancestors(path)):
        directory = mount + parent
        if kind(directory) not in (PARENT, UNFINISHED):
            if os.path.isdir(directory):
                return
        elif not _rmdir(directory):
            return
