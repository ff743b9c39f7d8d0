"""Mounts as descriptors: new file systems, clones of trees, their attributes and their propagation.

These are compositions of fsopen(2), open_tree(2), mount_setattr(2) and move_mount(2). A mount is made detached, gets
all its properties, and is attached last, so that no process sees it incomplete. No path that a container could have
changed is walked here: see `nodeagent.linux.confined`.
"""

import errno
import os
from collections.abc import Iterable, Mapping, Sequence

from nodeagent.linux import mountinfo, syscalls
from nodeagent.words import Propagation

PROPAGATIONS: dict[Propagation, int] = {
    "private": syscalls.MS_PRIVATE,
    "slave": syscalls.MS_SLAVE,
    "shared": syscalls.MS_SHARED,
}

_ATTRIBUTES = {
    "ro": syscalls.MOUNT_ATTR_RDONLY,
    "nosuid": syscalls.MOUNT_ATTR_NOSUID,
    "nodev": syscalls.MOUNT_ATTR_NODEV,
    "noexec": syscalls.MOUNT_ATTR_NOEXEC,
    "nosymfollow": syscalls.MOUNT_ATTR_NOSYMFOLLOW,
    "relatime": syscalls.MOUNT_ATTR_RELATIME,
    "noatime": syscalls.MOUNT_ATTR_NOATIME,
    "strictatime": syscalls.MOUNT_ATTR_STRICTATIME,
}
_ATIME_NAMES = frozenset(("relatime", "noatime", "strictatime"))

# The kernel's own defaults may be others. Links in layers that redirect a lookup are never obeyed; the
# upper layer does not outlive a crash of the node, so that the sync of a whole disk at unmount is spared.
_OVERLAY_OPTIONS = "index=off,metacopy=off,redirect_dir=nofollow"
_OVERLAY_UPPER_OPTIONS = "volatile"


def attribute_mask(names: Iterable[str]) -> int:
    """The MOUNT_ATTR_… bits of names as in mount(8); `ValueError` for an unknown one."""
    mask = 0
    for name in names:
        if name not in _ATTRIBUTES:
            raise ValueError(f"unknown mount attribute {name!r}")
        mask |= _ATTRIBUTES[name]
    return mask


def make_filesystem(
    kind: str, data: Mapping[str, str] | None = None, attributes: Sequence[str] = ()
) -> int:
    """Mount a new file system, detached; a key of `data` with the value "" is a flag."""
    context = syscalls.fsopen(kind)
    try:
        for key, value in {"source": kind, **(data or {})}.items():
            _configure(context, key, value)
        syscalls.fsconfig(context, syscalls.FSCONFIG_CMD_CREATE)
        return syscalls.fsmount(context, attribute_mask(attributes))
    except OSError as error:
        raise OSError(error.errno, _explained(error, context), kind) from None
    finally:
        os.close(context)


def _configure(context: int, key: str, value: str) -> None:
    if value:
        syscalls.fsconfig(context, syscalls.FSCONFIG_SET_STRING, key, value)
    else:
        syscalls.fsconfig(context, syscalls.FSCONFIG_SET_FLAG, key)


def _explained(error: OSError, context: int) -> str:
    """The error with the kernel's own message, which fsopen(2)'s descriptor gives, if there is one."""
    try:
        message = os.read(context, 4096).decode(errors="replace").strip()
    except OSError:
        message = ""
    return f"{error.strerror} ({message})" if message else str(error.strerror)


def mount_overlay(
    target: str,
    lower: Sequence[int],
    upper: int | None = None,
    work: int | None = None,
    *,
    label: str = "",
) -> int:
    """Mount an overlay of open directories, uppermost first, on `target` and return its root.

    The directories are named through /proc/self/fd: their paths may have any length and any character,
    and do not appear in the container's mount table. mount(2) takes a page of options, where fsconfig(2)
    takes 256 bytes for all layers together before Linux 6.8. label: of SELinux, of all files.
    """
    options = [f"lowerdir={':'.join(map(_descriptor_path, lower))}", _OVERLAY_OPTIONS]
    if upper is not None and work is not None:
        options.append(f"upperdir={_descriptor_path(upper)},workdir={_descriptor_path(work)}")
        options.append(_OVERLAY_UPPER_OPTIONS)
    if label:
        options.append(_label_option(label))
    syscalls.mount("overlay", target, "overlay", 0, ",".join(options))
    return os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _label_option(label: str) -> str:
    """The option, quoted because of the commas between categories; a quote in it would let other options follow."""
    if '"' in label:
        raise ValueError(f"label {label!r} has a quote in it")
    return f'context="{label}"'


def _descriptor_path(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"


def clone_tree(descriptor: int, recursive: bool = True) -> int:
    """Make a detached bind mount of an open file or directory, with all mounts below it."""
    flags = syscalls.OPEN_TREE_CLONE | syscalls.AT_EMPTY_PATH
    return syscalls.open_tree(descriptor, "", flags | _recursion(recursive))


def set_attributes(mount: int, names: Iterable[str], recursive: bool = False) -> None:
    """Add attributes to a mount, and to all below it; a new kind of atime replaces the old one."""
    names = set(names)
    cleared = syscalls.MOUNT_ATTR_ATIME_MASK if names & _ATIME_NAMES else 0
    flags = syscalls.AT_EMPTY_PATH | _recursion(recursive)
    added = attribute_mask(names)
    if added or cleared:
        syscalls.mount_setattr(mount, "", flags, attr_set=added, attr_clr=cleared)


def set_propagation(mount: int, propagation: Propagation, recursive: bool = True) -> None:
    flags = syscalls.AT_EMPTY_PATH | _recursion(recursive)
    syscalls.mount_setattr(mount, "", flags, propagation=PROPAGATIONS[propagation])


def attach_apart(tree: int, target: int) -> None:
    """Attach a tree inside a shared mount, without propagating it to the peers of that mount.

    The mount leaves its peer group meanwhile: what a peer mounts in these microseconds is not propagated to it.
    """
    root = _root_of_mount(target)
    # A clone is a member of the group and keeps it alive: it is what the mount joins again below.
    group = clone_tree(root, recursive=False)
    set_propagation(root, "private", recursive=False)
    try:
        syscalls.move_mount(tree, target)
    finally:
        syscalls.set_mount_group(group, root)
        os.close(group)
        os.close(root)


def _root_of_mount(descriptor: int) -> int:
    """The root of the mount that an open file was reached through, which must be in the caller's own tree.

    The path in the mount table is only a hint: the opened file is checked to be on the same mount.
    """
    point = _mount_of(descriptor).point
    root = os.open(point, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    if syscalls.statx_mount_id(root) != syscalls.statx_mount_id(descriptor):
        os.close(root)
        raise OSError(errno.EAGAIN, "the mount is being moved or covered", point)
    return root


def map_ids(mount: int, userns: int, recursive: bool = True) -> None:
    """Make a detached mount show its files' owners through the mapping of a user namespace."""
    flags = syscalls.AT_EMPTY_PATH | _recursion(recursive)
    syscalls.mount_setattr(mount, "", flags, attr_set=syscalls.MOUNT_ATTR_IDMAP, userns=userns)


def propagation_of(descriptor: int) -> Propagation:
    """How the mount that an open file is on propagates."""
    fields = _mount_of(descriptor).propagation
    if any(field.startswith("shared:") for field in fields):
        return "shared"
    return "slave" if any(field.startswith("master:") for field in fields) else "private"


def filesystem_of(descriptor: int) -> str:
    """The kind of file system that an open file is on, as in "ext4"."""
    return _mount_of(descriptor).kind


def devices_of(kind: str) -> set[int]:
    """st_dev of all file systems of a kind that are mounted in the caller's namespace."""
    found = set()
    for mount in mountinfo.parse(mountinfo.table()):
        if mount.kind == kind:
            major, minor = mount.device.split(":")
            found.add(os.makedev(int(major), int(minor)))
    return found


def _mount_of(descriptor: int) -> mountinfo.Mount:
    """The mount that an open file was reached through."""
    return mountinfo.with_id(syscalls.statx_mount_id(descriptor))


def isolate() -> None:
    """Cut all propagation between the caller's own mount namespace and others."""
    syscalls.mount("", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)


def enter_root(root: int) -> None:
    """Make the mount with root directory `root` the root of the namespace, and drop all others.

    pivot_root(2), "pivot_root(".", ".")": the old root is put on top of the new one, and is detached from there.
    """
    os.fchdir(root)
    syscalls.pivot_root(".", ".")
    syscalls.umount2(".", syscalls.MNT_DETACH)
    os.chdir("/")


def _recursion(recursive: bool) -> int:
    return syscalls.AT_RECURSIVE if recursive else 0
