"""The namespaces of a pod and its /dev/shm: made by its supervisor, which lives in them, and pinned by mounts.

The pins are below the pod's directory, in a mount that the agent has made private. They keep the namespaces when the
supervisor dies, and lead a successor back into them.
"""

import os
from collections.abc import Collection

from nodeagent.linux import syscalls

DEFAULT_SHM_BYTES = 64 << 20

_FLAGS = {
    "net": syscalls.CLONE_NEWNET,
    "ipc": syscalls.CLONE_NEWIPC,
    "uts": syscalls.CLONE_NEWUTS,
}
_NSFS_MAGIC = 0x6E736673
_SHM_FLAGS = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC


def make(pod: str, kinds: Collection[str]) -> None:
    """Leave the node's namespaces of these kinds for new ones, and pin them. pod: the pod's directory."""
    syscalls.unshare(sum(_FLAGS[kind] for kind in kinds))
    os.makedirs(f"{pod}/ns", mode=0o700, exist_ok=True)
    for kind in kinds:
        pin = _pin(pod, kind)
        os.close(os.open(pin, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
        syscalls.mount(f"/proc/self/ns/{kind}", pin, "", syscalls.MS_BIND)
    if "ipc" in kinds:
        mount_shm(pod)


def enter(pod: str, kinds: Collection[str]) -> None:
    """Go where the pins of an earlier supervisor lead; without a pin there is no namespace."""
    for kind in kinds:
        try:
            descriptor = os.open(_pin(pod, kind), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            if syscalls.statfs_type(descriptor) == _NSFS_MAGIC:
                syscalls.setns(descriptor, _FLAGS[kind])
        finally:
            os.close(descriptor)


def mount_shm(pod: str) -> None:
    os.makedirs(_shm(pod), mode=0o755, exist_ok=True)
    options = f"mode=1777,size={DEFAULT_SHM_BYTES}"
    syscalls.mount("shm", _shm(pod), "tmpfs", _SHM_FLAGS, options)


def resize_shm(pod: str, size_bytes: int) -> None:
    flags = _SHM_FLAGS | syscalls.MS_REMOUNT
    syscalls.mount("shm", _shm(pod), "tmpfs", flags, f"size={size_bytes}")


def unpin(pod: str) -> None:
    """Remove all mounts that were made here. Idempotent; what still uses them goes on."""
    for path in (_shm(pod), *(_pin(pod, kind) for kind in _FLAGS)):
        try:
            syscalls.umount2(path, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
        except OSError:
            pass


def _pin(pod: str, kind: str) -> str:
    return f"{pod}/ns/{kind}"


def _shm(pod: str) -> str:
    return f"{pod}/shm"
