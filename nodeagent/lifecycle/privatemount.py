"""The mount that pinned namespaces and shared memory of pods are in, private: no other mount namespace sees them.

Copies of them elsewhere would keep a pod's network alive after the pod. The mount stays while a pod does.
"""

from pathlib import Path

from nodeagent.linux import syscalls


def ensure(directory: Path) -> None:
    """Mount a directory on itself, once, without propagation."""
    path = str(directory)
    if not _is_mount_point(path):
        syscalls.mount(path, path, "", syscalls.MS_BIND)
    syscalls.mount("", path, "", syscalls.MS_PRIVATE)


def remove(directory: Path) -> None:
    """Unmount it, once it is empty."""
    if _is_mount_point(str(directory)):
        syscalls.umount2(str(directory), syscalls.MNT_DETACH)


def _is_mount_point(path: str) -> bool:
    escaped = path.replace("\\", "\\134").replace(" ", "\\040")
    with open("/proc/self/mountinfo", errors="surrogateescape") as table:
        return any(line.split(" ", 5)[4] == escaped for line in table)
