"""The procfs of a PID namespace that a container shares.

A new procfs shows the PID namespace of the process that mounts it (proc(5)); only newest kernels have an option for
another one. A process that prepares a container from outside its PID namespace therefore clones a mount made inside.
"""

import errno
import os

from nodeagent.errors import FailedPrecondition
from nodeagent.linux import mounts, syscalls

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


def make() -> int:
    """A detached procfs of the caller's own PID namespace."""
    return mounts.make_filesystem("proc", {}, ["nosuid", "nodev", "noexec"])


def of_shared(process: int, path: str) -> int:
    """A detached procfs of the PID namespace of a pidfd's process, in which the caller's children will be born.

    path: where one is mounted on the node; "" clones the one at /proc of that process, and raises FailedPrecondition
    where that has another one, or none.
    """
    try:
        syscalls.setns(process, syscalls.CLONE_NEWPID)
        tree = _clone(path) if path else _clone_of(process)
    except ProcessLookupError:
        raise FailedPrecondition("the container whose processes are joined has ended") from None
    mounts.set_propagation(tree, "private")
    if not path:
        _require_namespace_of_children(tree)
    return tree


def _clone_of(process: int) -> int:
    # Opened before: /proc is the container's from the first call on.
    own = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    syscalls.setns(process, syscalls.CLONE_NEWNS)
    try:
        return _clone("/proc")
    finally:
        syscalls.setns(own, syscalls.CLONE_NEWNS)
        os.close(own)


def _clone(path: str) -> int:
    """Clone a mount without what is mounted below, but with it where that is locked, as masks in a user namespace are.

    open_tree(2) refuses with EINVAL to uncover what locked mounts cover.
    """
    directory = os.open(path, _DIRECTORY | os.O_NOFOLLOW)
    try:
        return mounts.clone_tree(directory, recursive=False)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return mounts.clone_tree(directory)
    finally:
        os.close(directory)


def _require_namespace_of_children(tree: int) -> None:
    """Require that the tree is a procfs of the namespace: a container may have put anything at its /proc.

    The first process of a PID namespace cannot leave it, so that its namespace tells that of the procfs.
    """
    expected = os.stat("/proc/self/ns/pid_for_children")
    try:
        if syscalls.statfs_type(tree) != syscalls.PROC_SUPER_MAGIC:
            raise FileNotFoundError
        found = os.stat("1/ns/pid", dir_fd=tree)
    except FileNotFoundError:
        found = None
    if found is None or not os.path.samestat(found, expected):
        raise FailedPrecondition(
            "the container whose processes are joined has no procfs of its own at /proc"
        )
