"""The private mount of the pods' directory: no other mount namespace sees pinned namespaces and shared memory.

Copies of them elsewhere would keep a pod's network alive after the pod. The mount stays while a pod does.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nodeagent.linux import mountinfo, syscalls


@contextmanager
def mounted(directory: Path) -> Iterator[None]:
    """Mount a directory on itself, without propagation. On leaving an empty one is unmounted."""
    path = str(directory)
    if not is_there(directory):
        syscalls.mount(path, path, "", syscalls.MS_BIND)
    # A call of its own: a change of propagation takes no other flags (mount(2)).
    syscalls.mount("", path, "", syscalls.MS_PRIVATE)
    try:
        yield
    finally:
        if not os.listdir(path):
            syscalls.umount2(path, syscalls.MNT_DETACH)


def is_there(directory: Path) -> bool:
    """Whether a directory is a mount point."""
    mounts = mountinfo.parse(mountinfo.table())
    return any(mount.point == str(directory) for mount in mounts)
