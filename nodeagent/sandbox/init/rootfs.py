"""Execution of a mount plan: the root file system of a container, ready to be entered.

It runs in the container's first process, in a mount namespace that is still a copy of the node's. All host paths are
opened before anything of the container is examined. From then on the container's tree is touched only through
`nodeagent.linux.confined`, one walk for each path, and through the descriptors that come of it; a mount is made
detached and attached when it is complete. Descriptors are left open: all of them are closed at once before execve.
"""

import errno
import os
import stat
from typing import NamedTuple

from nodeagent.errors import SHORTAGES, FailedPrecondition, InvalidArgument, ResourceExhausted
from nodeagent.linux import confined, mounts, syscalls
from nodeagent.sandbox import idmaps, rootfs_defaults
from nodeagent.sandbox.host_path import open_host_path, require_propagation
from nodeagent.sandbox.idmaps import IdMaps
from nodeagent.sandbox.init import relabel, volumes
from nodeagent.sandbox.init.devices import (
    is_own_dev,
    make_dev,
    make_devices_outside_dev,
    require_devices,
)
from nodeagent.sandbox.init.filesystems import make_filesystem
from nodeagent.sandbox.init.layers import (
    Layers,
    Scratch,
    image_tree,
    layer_directories,
    make_scratch,
    mount_point,
    open_layers,
    open_own_layers,
)
from nodeagent.sandbox.init.steps import find, is_directory, of_step
from nodeagent.sandbox.rootfs_defaults import describe
from nodeagent.sandbox.spec import ContainerPlan, Mount, Volume

# A link would lead a file system of the kernel away from its masks, and the pod's shared memory out of /dev.
_NEVER_THROUGH_LINKS = frozenset(("/proc", "/sys", "/dev", "/dev/shm"))
_PROC_ROOT_INO = 1  # of every procfs (PROC_ROOT_INO of linux/proc_ns.h)


class Source(NamedTuple):
    """The source of a mount on the node: a detached tree, or layers."""

    tree: int = -1
    layers: Layers = Layers((), {})


class Assembly(NamedTuple):
    """A root file system that is being assembled.

    dev: the root of the container's own /dev, by which all in it is reached; -1 where the request mounts one.
    procfs: a detached one that is used instead of a new one, -1 without.
    sealed: mounts that become read-only when all is in place.
    devices: st_dev of the image's own file system and of that /dev, where most mounts land.
    shares: whether a volume propagates mounts to the node.
    """

    root: int
    dev: int
    scratch: Scratch
    maps: IdMaps
    procfs: int
    sealed: list[int]
    devices: tuple[int, ...]
    shares: bool


def assemble(plan: ContainerPlan, maps: IdMaps, procfs: int = -1) -> Assembly:
    """Mount all that the plan asks for; nothing is masked or read-only yet.

    procfs: of the PID namespace that the container shares, where the caller is in another one; -1 makes a new one.
    """
    lower = open_layers(plan["rootfs"]["lower"], maps)
    upper, work = open_own_layers(plan["rootfs"], maps)
    sources = [_open_source(mount, maps) for mount in plan["mounts"]]
    own = [(volume, volumes.make(volume["source"])) for volume in plan.get("volumes", [])]
    mounts.isolate()  # from here on nothing that is mounted reaches the node, but through a shared volume
    label = plan["rootfs"].get("label", "")
    scratch = make_scratch(os.path.dirname(plan["rootfs"]["upper"]), label)
    directories = layer_directories(scratch, lower, maps)
    point = mount_point(scratch, "root")
    root = mounts.mount_overlay(point, directories, upper, work, label=label)
    _forbid_devices(root, own, plan, maps)
    # What is made from here on, mount points included, belongs to the container's root.
    idmaps.act_as_root(maps)
    dev = make_dev(plan, maps)
    sealed = [root] if plan["rootfs"]["readonly"] else []
    shares = any(mount["propagation"] == "shared" for mount in plan["mounts"])
    devices = tuple(os.fstat(place).st_dev for place in (root, dev) if place != -1)
    assembly = Assembly(root, dev, scratch, maps, procfs, sealed, devices, shares)
    # In this order: devices while the root has no mounts, volumes while it has none of the request, to copy from the
    # image and from nothing else.
    make_devices_outside_dev(root, plan, maps)
    for volume, tree in own:
        _attach_volume(root, volume, tree)
    for mount, source in zip(plan["mounts"], sources, strict=True):
        _execute(assembly, mount, source)
    require_devices(root, plan)
    return assembly


def seal(assembly: Assembly, masked: list[str], readonly: list[str]) -> None:
    """Mask paths, make paths and mounts read-only; a path that the container does not have is skipped."""
    mounts.set_attributes(assembly.scratch.mount, ["ro"])
    for path in readonly:
        _make_readonly(assembly, path)
    for path in masked:
        _mask(assembly, path)
    for mount in assembly.sealed:
        mounts.set_attributes(mount, ["ro"])


# ---- what is the node's ----


def _open_source(mount: Mount, maps: IdMaps) -> Source:
    if mount["kind"] == "bind":
        return Source(tree=_clone_host_path(mount, maps))
    if mount["kind"] == "image":
        return Source(layers=open_layers(mount.get("lower", []), maps))
    return Source()


def _clone_host_path(mount: Mount, maps: IdMaps) -> int:
    origin = open_host_path(mount)
    require_propagation(mount, origin)
    if "label" in mount:
        relabel.require_relabelable(origin, mount["source"])
        relabel.relabel_tree(origin, mount["label"], mount["source"])
    try:
        tree = mounts.clone_tree(origin)
    except OSError as error:
        # A pipe, a socket or a file without a name, by its descriptor in procfs.
        what = f'host path "{mount["source"]}" for {mount["target"]}'
        if error.errno in SHORTAGES:
            raise of_step(what, error) from error
        text = f"{what}: cannot be mounted: {os.strerror(error.errno or 0)}"
        raise FailedPrecondition(text) from error
    mounts.set_attributes(tree, mount["attributes"], mount["recursive"])
    idmaps.map_volume(tree, origin, mount, maps)
    if mount["propagation"] != "shared":  # a clone of a shared mount shares already
        mounts.set_propagation(tree, mount["propagation"])
    return tree


# ---- what is the container's ----


def _forbid_devices(
    root: int, own: list[tuple[Volume, int]], plan: ContainerPlan, maps: IdMaps
) -> None:
    """Forbid devices of the image in a user namespace, whose root would own them and gets none of the node's.

    A device that is requested outside of /dev is made in the image's own file system, which has to allow it then.
    """
    if maps.is_node:
        return
    if all(device["path"].startswith("/dev/") for device in plan["devices"]):
        mounts.set_attributes(root, ["nodev"])
    for _, tree in own:
        mounts.set_attributes(tree, ["nodev"])


def _attach_volume(root: int, volume: Volume, tree: int) -> None:
    """Fill a volume and attach it, while only other volumes are mounted: what is copied is the image's."""
    what = f"volume of the image at {volume['target']}"
    try:
        target = confined.make_path(root, volume["target"], directory=True)
        if not is_directory(target):
            raise FailedPrecondition(f"{what}: the image has a file there")
        if os.path.samestat(os.fstat(target), os.fstat(root)):
            return  # by a link of the image to its root, where a volume has no meaning
        volumes.fill(tree, target)
        if "label" in volume:
            relabel.relabel_tree(tree, volume["label"], volume["source"])
        syscalls.move_mount(tree, target)
    except OSError as error:
        raise of_step(what, error) from error
    except ResourceExhausted as error:
        raise ResourceExhausted(f"{what}: {error}") from None


def _execute(assembly: Assembly, mount: Mount, source: Source) -> None:
    try:
        _attach(assembly, mount, _tree(assembly, mount, source))
    except OSError as error:
        raise of_step(f"mount {describe(mount)}", error) from error


def _tree(assembly: Assembly, mount: Mount, source: Source) -> int:
    """The tree to attach; a read-only one of ours is sealed at the end, as mount points may have to be made in it."""
    if mount["kind"] == "bind":
        return source.tree
    if mount["kind"] == "image":
        return image_tree(assembly.scratch, assembly.maps, mount, source.layers)
    if is_own_dev(mount):
        tree = assembly.dev
    elif mount["source"] == "proc" and assembly.procfs != -1:
        tree = assembly.procfs
        mounts.set_attributes(tree, [name for name in mount["attributes"] if name != "ro"])
    else:
        tree = make_filesystem(mount, assembly.maps)
    if "ro" in mount["attributes"]:
        assembly.sealed.append(tree)
    return tree


def _attach(assembly: Assembly, mount: Mount, tree: int) -> None:
    directory = mount["kind"] == "fs" or is_directory(tree)
    target = _open_target(assembly, mount, directory)
    status = os.fstat(target)
    if directory != stat.S_ISDIR(status.st_mode):
        kinds = ("is a directory", "is none")
        ours, theirs = kinds if directory else reversed(kinds)
        raise FailedPrecondition(
            f"mount {describe(mount)}: what is mounted {ours}, and what the container has there {theirs}"
        )
    if mount["kind"] != "fs":
        _check_procfs(assembly, mount, status, tree)
    _move_mount(assembly, tree, target, describe(mount) if mount["kind"] == "fs" else "")


def _move_mount(assembly: Assembly, tree: int, target: int, ours: str = "") -> None:
    """Attach a tree, but never so that it appears on the node, by a mount that is shared with it, and stays there.

    It would cover the node's /dev/pts or /sys/fs/cgroup, for example. What a request mounts in what it shares, and
    masks, are attached apart; what every container has is not attached at all: removing it again would remove what the
    node has at that place. ours: how errors describe a mount of that kind.
    """
    if not assembly.shares or mounts.propagation_of(target) != "shared":
        syscalls.move_mount(tree, target)
        return
    if ours:
        raise FailedPrecondition(
            f"mount {ours}: its place is in a tree that is shared with the node, where the runtime mounts nothing of "
            "its own; mount that tree without Bidirectional propagation"
        )
    mounts.attach_apart(tree, target)


def _open_target(assembly: Assembly, mount: Mount, directory: bool) -> int:
    """Open where to mount; in a /dev of our own through that file system, whatever the root has at its place."""
    path = mount["target"]
    own_dev = assembly.dev != -1 and path.startswith("/dev/")
    follow = not (
        own_dev
        or mount["kind"] == "fs"
        or path in _NEVER_THROUGH_LINKS
        or path in rootfs_defaults.MOUNTABLE_IN_PROCFS
    )
    root, below = (assembly.dev, path.removeprefix("/dev/")) if own_dev else (assembly.root, path)
    try:
        return confined.make_path(root, below, directory=directory, follow=follow)
    except FileNotFoundError as error:  # "self" of a procfs, too, whose PID namespace is not ours
        raise InvalidArgument(
            f"mount {describe(mount)}: the path does not exist, and leads into a file system in which none can"
            " be made, such as procfs"
        ) from error
    except PermissionError as error:  # sysfs and devpts take nothing new
        raise FailedPrecondition(
            f"mount {describe(mount)}: the path does not exist, and cannot be made or reached where it leads:"
            f" {os.strerror(error.errno or 0)}"
        ) from error
    except OSError as error:
        if error.errno != errno.ELOOP or follow:
            raise
        raise InvalidArgument(
            f"mount {describe(mount)}: the path leads through a symbolic link of the image or of a volume,"
            " which is not followed here; it has to be a directory or a file"
        ) from error


def _check_procfs(assembly: Assembly, mount: Mount, target: os.stat_result, tree: int) -> None:
    """Refuse mounts of a request over procfs, even through a link: what counts is what the target is.

    Programs that set a label or a limit would write it into a file of whoever asked for the mount (CVE-2019-16884).
    """
    path = mount["target"]
    if path == "/proc":
        status = os.fstat(tree)
        if status.st_ino != _PROC_ROOT_INO or status.st_dev not in mounts.devices_of("proc"):
            text = "only a whole procfs can be mounted there"
            raise InvalidArgument(f"mount {describe(mount)}: {text}")
    elif path not in rootfs_defaults.MOUNTABLE_IN_PROCFS and (
        target.st_dev not in assembly.devices and target.st_dev in mounts.devices_of("proc")
    ):
        raise InvalidArgument(
            f"mount {describe(mount)}: is inside of procfs; only these files of it can be covered,"
            f" by their names: {', '.join(sorted(rootfs_defaults.MOUNTABLE_IN_PROCFS))}"
        )


# ---- masks ----


def _mask(assembly: Assembly, path: str) -> None:
    target = find(assembly.root, path)
    if target is None:
        return
    mask = assembly.scratch.empty if is_directory(target) else assembly.scratch.null
    _move_mount(assembly, mounts.clone_tree(mask, recursive=False), target)


def _make_readonly(assembly: Assembly, path: str) -> None:
    target = find(assembly.root, path)
    if target is None:
        return
    tree = mounts.clone_tree(target)
    mounts.set_attributes(tree, ["ro"], recursive=True)
    _move_mount(assembly, tree, target)
