"""Paths by which the agent, the launcher and the supervisors find each other, and the pins of a pod's namespaces.

The files of a pod are in ``<state>/pods/<id>``: the socket of its supervisor, ``ns/<kind>``, the bind mounts that pin
its namespaces, and ``shared``, the tmpfs of what its containers share.
"""

import errno
import os

from nodeagent.linux import syscalls

SUPERVISOR_SOCKET = "supervisor.sock"  # in the pod's directory
LAUNCHER_SOCKET = "launcher.sock"  # in the state directory
# What a launcher writes to the descriptor that it was given, once it listens.
LAUNCHER_READY = b"ready"

# Errors of umount2(2) for a path that is not there, or is no mount point.
_NOTHING_MOUNTED = frozenset((errno.ENOENT, errno.ENOTDIR, errno.EINVAL))

_PINNED = ("net", "ipc", "uts", "user")
SHARED = "shared"


def container(pod: str, container_id: str) -> str:
    """The directory of a container in that of its pod: its plan, its state, the journal of its log, its bundle."""
    return f"{pod}/containers/{container_id}"


def shared(pod: str) -> str:
    """The tmpfs of what the pod's containers share; the pod's own directory where an earlier version made the pod."""
    path = f"{pod}/{SHARED}"
    return path if os.path.isdir(path) else pod


def procfs_pin(pod: str) -> str:
    return pin(pod, "proc")


def unpin(pod: str) -> bool:
    """Remove all mounts that were made here, or by an earlier version. Idempotent; what still uses them goes on.

    False where the kernel could not do it now: nobody can remove the pod's directory then.
    """
    is_done = True
    pins = (procfs_pin(pod), *(pin(pod, kind) for kind in _PINNED))
    for path in (f"{pod}/{SHARED}", f"{pod}/shm", *pins):
        try:
            syscalls.umount2(path, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
        except OSError as error:
            is_done = is_done and error.errno in _NOTHING_MOUNTED
    return is_done


def pin(pod: str, kind: str) -> str:
    return f"{pod}/ns/{kind}"
