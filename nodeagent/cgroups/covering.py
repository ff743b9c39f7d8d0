"""Detection of a mount that covers the cgroup hierarchy which was found at a path.

A pod can mount over /sys/fs/cgroup, or over a directory above it, where a volume shares its mounts with the node: the
groups that are made and limited then are not those of the node.
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
    """The root of a hierarchy, known by device and inode once it was found in the table of mounts."""

    def __init__(self, hierarchy: Hierarchy) -> None:
        self.mount = hierarchy.mount
        self._root: Identity | None = None
        self.is_covered()

    def is_covered(self) -> bool:
        """Whether the hierarchy is covered: one stat(2) while it is not.

        Blocks where the covering file system does. Raises OSError where the answer cannot be found.
        """
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
    """Whether a mount shows the same as the first cgroup mount at a path, as that one itself or a copy of it does.

    Mounts that cover it come after it, and have another device or a group below as root (proc_pid_mountinfo(5)).
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
