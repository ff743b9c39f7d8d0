"""Mounts of the agent's own mount namespace below directories that are its own.

All that belongs there are the mounts that a supervisor makes in its pod's directory (`nodeagent.sandbox.paths`); what a
container mounts is in a namespace of its own. Only what is in a directory's entries is looked at, never a mount on the
directory itself: that is the operator's, who has given it a file system of its own.
"""

import errno
import os
from collections.abc import Iterable
from pathlib import Path

from nodeagent.linux import mountinfo, syscalls

# Errors for a path that another program has removed, or replaced by a link, since the table was read.
_GONE = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP))


def below(directories: Iterable[Path]) -> dict[str, Path]:
    """The mount points in the entries of these directories, each with its entry. Raises OSError."""
    prefixes = [f"{directory}/" for directory in directories]
    found: dict[str, Path] = {}
    for mount in mountinfo.parse(mountinfo.table()):
        for prefix in prefixes:
            if mount.point.startswith(prefix):
                entry, _, _ = mount.point.removeprefix(prefix).partition("/")
                found[mount.point] = Path(prefix + entry)
    return found


def detach(point: str) -> bool:
    """Detach what is mounted there, with all that is mounted in it; False where there is nothing. Raises OSError.

    Whoever uses it goes on. The path may lead through files of a container: links are not followed.
    """
    mounts = [mount for mount in mountinfo.parse(mountinfo.table()) if mount.point == point]
    if not mounts:
        return False
    try:
        place = syscalls.openat2(
            syscalls.AT_FDCWD, point, os.O_PATH, resolve=syscalls.RESOLVE_NO_SYMLINKS
        )
    except OSError as error:
        if error.errno in _GONE:
            return False
        raise
    try:
        # The uppermost one, if it is still there: it is taken by its descriptor, wherever the path leads by now.
        if syscalls.statx_mount_id(place) != mounts[-1].id:
            return False
        syscalls.umount2(f"/proc/self/fd/{place}", syscalls.MNT_DETACH)
    finally:
        os.close(place)
    return True
