"""The namespaces of a pod, and the files that its containers share: made by its supervisor, and kept by mounts.

Shared memory, hosts, hostname and resolv.conf are in one tmpfs for each pod, at ``shared`` in the pod's directory. So
whatever a container writes to them is charged to the memory of its own cgroup, and takes no room that other pods need.
It is one file system, because each mount in the node's mount table costs every later start of a container a little.

The pins are below the pod's directory, in a mount that the agent has made private. They keep the namespaces when the
supervisor dies, and lead a successor back into them. Of a user namespace the supervisor makes the other namespaces,
but stays in the node's itself: it has to write where the node's root may.
"""

import os
from collections.abc import Collection

from nodeagent import files
from nodeagent.linux import syscalls, userns
from nodeagent.sandbox import idmaps
from nodeagent.sandbox.paths import SHARED, pin, procfs_pin, shared
from nodeagent.sandbox.spec import DEFAULT_SHM_BYTES, PodPlan

FILES_BYTES = 1 << 20  # for hosts, hostname and resolv.conf, beside shared memory

# Kinds that a supervisor lives in, as unshare(2) and setns(2) name them.
FLAGS = {
    "net": syscalls.CLONE_NEWNET,
    "ipc": syscalls.CLONE_NEWIPC,
    "uts": syscalls.CLONE_NEWUTS,
}
_NSFS_MAGIC = 0x6E736673
_SHARED_FLAGS = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC


def make(plan: PodPlan) -> None:
    """Leave the node's namespaces for new ones, of the kinds that the plan lists, and pin them."""
    pod, kinds = plan["directory"], plan["namespaces"]
    files.ensure_directory(f"{pod}/ns", 0o700)
    flags = sum(FLAGS[kind] for kind in kinds if kind != "user")
    if "user" in kinds:
        _enter_owned(plan, flags)
    else:
        syscalls.unshare(flags)
    for kind in kinds:
        if kind != "user":
            _make_pin(pod, kind, f"/proc/self/ns/{kind}")
    _mount_shared(pod)
    if "ipc" in kinds:
        _make_shm(f"{shared(pod)}/shm", *idmaps.root_of(plan))


def _enter_owned(plan: PodPlan, flags: int) -> None:
    """Enter new namespaces that belong to a new user namespace."""
    uids, gids = idmaps.extents(plan["uid_map"]), idmaps.extents(plan["gid_map"])
    made = userns.create(uids, gids, flags)
    try:
        owner = made[syscalls.CLONE_NEWUSER]
        _make_pin(plan["directory"], "user", f"/proc/self/fd/{owner}")
        for kind, descriptor in made.items():
            if kind & flags:
                syscalls.setns(descriptor, kind)
    finally:
        for descriptor in made.values():
            os.close(descriptor)


def _make_pin(pod: str, kind: str, source: str) -> None:
    path = pin(pod, kind)
    # The mount keeps the namespace alive without a process in it (namespaces(7)).
    os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    syscalls.mount(source, path, "", syscalls.MS_BIND)


def enter(pod: str, kinds: Collection[str]) -> None:
    """Enter the namespaces that an earlier supervisor has pinned; one without a pin was not made."""
    for kind in kinds:
        descriptor = -1 if kind == "user" else _open_pin(pod, kind)
        if descriptor != -1:
            try:
                syscalls.setns(descriptor, FLAGS[kind])
            finally:
                os.close(descriptor)


def user_namespace(pod: str) -> int:
    """A descriptor of the pod's user namespace, -1 without one."""
    return _open_pin(pod, "user")


def _open_pin(pod: str, kind: str) -> int:
    """A descriptor of the namespace that is pinned, -1 if none is."""
    try:
        descriptor = os.open(pin(pod, kind), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return -1
    if syscalls.statfs_type(descriptor) == _NSFS_MAGIC:
        return descriptor
    os.close(descriptor)
    return -1


def _mount_shared(pod: str) -> None:
    path = f"{pod}/{SHARED}"
    files.ensure_directory(path, 0o700)
    options = f"mode=700,size={DEFAULT_SHM_BYTES + FILES_BYTES}"
    syscalls.mount("shm", path, "tmpfs", _SHARED_FLAGS, options)


def _make_shm(path: str, uid: int, gid: int) -> None:
    os.mkdir(path)
    os.chown(path, uid, gid)
    os.chmod(path, 0o1777)  # not by mkdir(2), whose mode the umask reduces


def resize_shm(pod: str, size_bytes: int) -> None:
    flags = _SHARED_FLAGS | syscalls.MS_REMOUNT
    syscalls.mount("shm", shared(pod), "tmpfs", flags, f"size={size_bytes + FILES_BYTES}")


def pin_procfs(pod: str, tree: int) -> None:
    """Attach a detached procfs of the PID namespace that the pod's containers share."""
    files.ensure_directory(procfs_pin(pod), 0o700)
    point = os.open(procfs_pin(pod), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syscalls.move_mount(tree, point)
    finally:
        os.close(point)
