"""Whether a path still leads to the cgroup hierarchy that was found there, or another mount covers it.

A pod can mount over /sys/fs/cgroup, or over what is above it, where a volume shares its mounts with the node: groups
that are made and limited then are not those of the node.
"""

import errno
import os

from nodeagent.cgroups.hierarchy import Hierarchy
from nodeagent.linux import mountinfo, syscalls

_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_KINDS = ("cgroup", "cgroup2")
_NO_DIRECTORY = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)

Identity = tuple[int, int]


class Watched:
    """The root of a hierarchy, by device and inode; found in the table of mounts where those are not known yet."""

    def __init__(self, hierarchy: Hierarchy) -> None:
        self.mount = hierarchy.mount
        self._root: Identity | None = None
        self.is_covered()

    def is_covered(self) -> bool:
        """One stat(2) while all is well. Blocks where what covers it does. Raises OSError where it cannot be told."""
        try:
            visible = os.open(self.mount, _FLAGS)
        except OSError as error:
            if error.errno not in _NO_DIRECTORY:
                raise
            return True
        try:
            status = os.fstat(visible)
            identity = (status.st_dev, status.st_ino)
            if identity == self._root:
                return False
            if not _shows_the_lowest(syscalls.statx_mount_id(visible), self.mount):
                return True
            self._root = identity
            return False
        finally:
            os.close(visible)


def _shows_the_lowest(visible: int, path: str) -> bool:
    """Whether a mount shows the same as the first cgroup mount at a path, be it that one or a copy of it.

    Those that cover it come after it, and are of something else, or of a group below (proc_pid_mountinfo(5)).
    """
    lowest = shown = None
    for mount in mountinfo.parse(mountinfo.table()):
        if mount.kind not in _KINDS:
            continue
        if mount.point == path and lowest is None:
            lowest = (mount.device, mount.root)
        if mount.id == visible:
            shown = (mount.device, mount.root)
    return shown is not None and shown == lowest
