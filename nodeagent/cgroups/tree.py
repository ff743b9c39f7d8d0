"""Making and removing groups in one hierarchy, and telling those that the agent made from those of others.

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
"""Made because it was missing: removed as soon as it is empty, and never killed, for others may use it, too."""
UNFINISHED = b""
"""Not marked yet, and perhaps never, where the agent was killed: it can have no processes of the agent's."""

# A parent that is seen to be there can be removed, with its last child, before the next step.
_ATTEMPTS = 10

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_GONE = frozenset((errno.ENOENT, errno.ENODEV))

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
        os.chmod(directory, 0o755)  # whatever the umask: its container finds it at /sys/fs/cgroup
    except FileNotFoundError:
        raise  # who removes empty parents was faster; what is there now, if anything, is somebody else's
    except BaseException:
        _rmdir(directory)
        raise


def ancestors(path: str) -> list[str]:
    """The groups above `path` without the root, uppermost first."""
    names = path.split("/")[1:-1]
    return ["/" + "/".join(names[: depth + 1]) for depth in range(len(names))]


def kind(directory: str) -> bytes | None:
    """GROUP, PARENT or UNFINISHED for what the agent made, None for what others made, or nobody."""
    try:
        mode = os.stat(directory).st_mode  # first: a group is marked before it loses the sticky bit
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
    """`directory` and all groups below it, each after those inside it, as a name in an open directory.

    A container may nest groups deeper than a path can be long, and than there are descriptors: one is open at a time,
    and the way up is "..". Nothing where `directory` does not exist.
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
    """The open directory, in the place of `descriptor`; None, which leaves that open, for one that has gone."""
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


def require_group(mount: str, path: str, fence: str) -> None:
    """Raises FailedPrecondition for a group that exists and is not wholly the agent's.

    fence: the group itself or, out of its container's sight, one above it that is that container's alone: who has
    SYS_ADMIN can take the mark away from a group that he sees.
    """
    if kind(mount + path) in (GROUP, UNFINISHED) or not os.path.isdir(mount + path):
        return
    if fence == path or kind(mount + fence) is None:
        raise FailedPrecondition(f'cgroup "{path}": in {mount} it was not made by this agent')


def remove(mount: str, path: str, fence: str, deadline: float) -> None:
    """Remove the group and what is below it, also what a container made there; nothing to do where it is absent.

    Processes that were killed may still be on their way out: waits for them until `deadline` (of time.monotonic).
    Raises FailedPrecondition where some stay, and for a group that others made. fence: see `require_group`.
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
    """Why a part of it stays, or ""."""
    reason = ""
    for parent, name in bottom_up(directory):
        if not _rmdir(name, parent):
            reason = reason or _reason(name, parent)
    return reason


def _rmdir(directory: str, parent: int | None = None) -> bool:
    """False where processes or groups are in it."""
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
    """The text of a control file; `path` is relative to the open directory `parent`."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=parent)
    with open(file, encoding="ascii") as text:
        return text.read()


def remove_empty_parents(mount: str, path: str) -> None:
    """Remove the groups above `path` that were made for it, or its like, and that nobody needs any more.

    One that has gone already, as the kubelet removes all below a pod's group, does not protect those above it.
    """
    for parent in reversed(ancestors(path)):
        directory = mount + parent
        if kind(directory) not in (PARENT, UNFINISHED):
            if os.path.isdir(directory):
                return
        elif not _rmdir(directory):
            return
