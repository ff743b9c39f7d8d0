"""Making and removing groups in one hierarchy, and telling those that the agent made from those of others.

A group that the agent makes carries an extended attribute, so that this is known after a restart as well. Nothing is
ever removed but by rmdir(2), which refuses a group that has processes.
"""

import errno
import os
import time

from nodeagent.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound

MARK = "trusted.nodeagent"
GROUP = b"group"
"""Made for a container, an exec or a part of the agent: the agent may kill and remove what is in it."""
PARENT = b"parent"
"""Made because it was missing: removed as soon as it is empty, and never killed, for others may use it, too."""

# A parent that is seen to be there can be removed, with its last child, before the next step.
_ATTEMPTS = 10

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
    os.mkdir(directory)
    try:
        os.chmod(directory, 0o755)  # whatever the umask: its container finds it at /sys/fs/cgroup
        os.setxattr(directory, MARK, kind)
    except BaseException:
        os.rmdir(directory)
        raise


def ancestors(path: str) -> list[str]:
    """The groups above `path` without the root, uppermost first."""
    names = path.split("/")[1:-1]
    return ["/" + "/".join(names[: depth + 1]) for depth in range(len(names))]


def kind(directory: str) -> bytes | None:
    """GROUP or PARENT for what the agent made, None for what others made, or nobody."""
    try:
        return os.getxattr(directory, MARK)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
            return None
        raise


def bottom_up(directory: str) -> list[str]:
    """`directory` and all groups below it, each after those inside it. Empty where it does not exist."""
    found, position = [directory], 0
    while position < len(found):
        try:
            with os.scandir(found[position]) as entries:
                found += [e.path for e in entries if e.is_dir(follow_symlinks=False)]
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise
        position += 1
    return found[::-1]


def require_group(mount: str, path: str) -> None:
    """Raises FailedPrecondition for a group that exists and is not wholly the agent's."""
    if kind(mount + path) != GROUP and os.path.isdir(mount + path):
        raise FailedPrecondition(f'cgroup "{path}": in {mount} it was not made by this agent')


def remove(mount: str, path: str, deadline: float) -> None:
    """Remove the group and what is below it, also what a container made there; nothing to do where it is absent.

    Processes that were killed may still be on their way out: waits for them until `deadline` (of time.monotonic).
    Raises FailedPrecondition where some stay, and for a group that others made.
    """
    require_group(mount, path)
    if _rmdir(mount + path):
        return
    pause = _FIRST_PAUSE_S
    while busy := [directory for directory in bottom_up(mount + path) if not _rmdir(directory)]:
        if time.monotonic() >= deadline:
            raise FailedPrecondition(f'cgroup "{path}": not removed, {_reason(busy[0])}')
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def _rmdir(directory: str) -> bool:
    """False where processes or groups are in it."""
    try:
        os.rmdir(directory)
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def _reason(directory: str) -> str:
    try:
        with open(f"{directory}/cgroup.procs", encoding="ascii") as file:
            pids = file.read().split()
    except OSError:
        pids = []
    return (
        f"processes {', '.join(pids[:10])} are in {directory}" if pids else f"{directory} is busy"
    )


def remove_empty_parents(mount: str, path: str) -> None:
    """Remove the groups above `path` that were made for it, or its like, and that nobody needs any more."""
    for parent in reversed(ancestors(path)):
        if kind(mount + parent) != PARENT or not _rmdir(mount + parent):
            return
