"""Execution of a mount plan: the root file system of a container, ready to be entered.

Runs in the container's first process, in a mount namespace that is still a copy of the node's. All host paths are
opened before anything of the container is looked at. From then on the container's tree is touched only through
`nodeagent.linux.confined`, one walk for each path, and through the descriptors that come of it; a mount is made
detached and attached when it is complete. Descriptors are left open: all of them are closed at once before execve.
"""

import errno
import os
import stat
from contextlib import suppress
from typing import NamedTuple

from nodeagent import files
from nodeagent.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from nodeagent.linux import confined, mounts, syscalls
from nodeagent.sandbox import idmaps, rootfs_defaults
from nodeagent.sandbox.idmaps import IdMaps
from nodeagent.sandbox.init import relabel, volumes
from nodeagent.sandbox.rootfs_defaults import describe
from nodeagent.sandbox.spec import ContainerPlan, Device, Mount, Rootfs, Volume

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_DEVICE_KINDS = {"c": stat.S_IFCHR, "b": stat.S_IFBLK}

# A link would lead a file system of the kernel away from its masks, and the pod's shared memory out of /dev.
_NEVER_THROUGH_LINKS = frozenset(("/proc", "/sys", "/dev", "/dev/shm"))
_PROC_ROOT_INO = 1  # of every procfs

# What a path of a request, of an image or of a volume can be at fault for: EISDIR where a file was to be mounted.
_FAULTS_OF_A_PATH = frozenset(
    (errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EROFS, errno.ENAMETOOLONG)
)


class Layers(NamedTuple):
    """Layers by their paths, uppermost first, and what is open of them: each, or what holds them if they are mapped."""

    paths: tuple[str, ...]
    directories: dict[str, int]


class Source(NamedTuple):
    """What a step of the plan mounts, as far as it is on the node: a detached tree, or layers."""

    tree: int = -1
    layers: Layers = Layers((), {})


class Scratch(NamedTuple):
    """A small file system of ours that no path of the container leads to.

    It has room for mount points, and what masks are made of: an empty directory and a null device.
    """

    mount: int
    path: str
    empty: int
    null: int


class Assembly(NamedTuple):
    """A root file system in the making.

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
    lower = _open_layers(plan["rootfs"]["lower"], maps)
    upper, work = _open_own_layers(plan["rootfs"], maps)
    sources = [_open_source(mount, maps) for mount in plan["mounts"]]
    own = [(volume, volumes.make(volume["source"])) for volume in plan.get("volumes", [])]
    mounts.isolate()
    label = plan["rootfs"].get("label", "")
    scratch = _make_scratch(os.path.dirname(plan["rootfs"]["upper"]), label)
    directories = _layer_directories(scratch, lower, maps)
    point = _mount_point(scratch, "root")
    root = mounts.mount_overlay(point, directories, upper, work, label=label)
    _forbid_devices(root, own, plan, maps)
    idmaps.act_as_root(maps)
    dev = _make_dev(plan, maps)
    sealed = [root] if plan["rootfs"]["readonly"] else []
    shares = any(mount["propagation"] == "shared" for mount in plan["mounts"])
    devices = tuple(os.fstat(place).st_dev for place in (root, dev) if place != -1)
    assembly = Assembly(root, dev, scratch, maps, procfs, sealed, devices, shares)
    _make_devices_outside_dev(root, plan, maps)
    for volume, tree in own:
        _attach_volume(root, volume, tree)
    for mount, source in zip(plan["mounts"], sources, strict=True):
        _execute(assembly, mount, source)
    _require_devices(assembly, plan)
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


def _open_layers(paths: list[str], maps: IdMaps) -> Layers:
    opened = paths if maps.is_node else [os.path.dirname(path) for path in paths]
    return Layers(tuple(paths), {path: os.open(path, _DIRECTORY) for path in dict.fromkeys(opened)})


def _open_own_layers(plan: Rootfs, maps: IdMaps) -> tuple[int, int]:
    """The upper and work directories.

    What a volatile overlay has left in `work` would keep it from being mounted again, as a start that is repeated does.
    """
    leftover = os.path.join(plan["work"], "work")
    if os.path.exists(leftover):
        files.remove_tree(leftover)
    if not maps.is_node:
        os.chown(plan["upper"], maps.uid(0), maps.gid(0))
    return os.open(plan["upper"], _DIRECTORY), os.open(plan["work"], _DIRECTORY)


def _open_source(mount: Mount, maps: IdMaps) -> Source:
    if mount["kind"] == "bind":
        return Source(tree=_clone_host_path(mount, maps))
    if mount["kind"] == "image":
        return Source(layers=_open_layers(mount.get("lower", []), maps))
    return Source()


def open_host_path(mount: Mount) -> int:
    """An absent one is made a directory where the plan says so, as every other runtime does."""
    path, absent = mount["source"], mount.get("absent")
    what = f'host path "{path}" for {mount["target"]}'
    try:
        try:
            return syscalls.open_tree(syscalls.AT_FDCWD, path, 0)
        except FileNotFoundError:
            if absent != "make":
                raise
        _make_directories(path)
        return syscalls.open_tree(syscalls.AT_FDCWD, path, 0)
    except FileNotFoundError as error:
        reason = ", and absent_mount_sources_to_reject has it" if absent == "reject" else ""
        raise NotFound(f"{what}: {os.strerror(errno.ENOENT)}{reason}") from error
    except OSError as error:
        raise FailedPrecondition(f"{what}: {os.strerror(error.errno or 0)}") from error


def _make_directories(path: str) -> None:
    """With the parents that are missing, 0755, of the node's root.

    No link to nothing is followed: who made it would choose what is made.
    """
    missing = [path]
    while not os.path.lexists(parent := os.path.dirname(missing[-1])):
        missing.append(parent)
    for directory in reversed(missing):
        with suppress(FileExistsError):  # of another container, or a link to nothing
            os.mkdir(directory, 0o755)


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
        text = f"{what}: cannot be mounted: {os.strerror(error.errno or 0)}"
        raise FailedPrecondition(text) from error
    mounts.set_attributes(tree, mount["attributes"], mount["recursive"])
    idmaps.map_volume(tree, origin, mount, maps)
    if mount["propagation"] != "shared":  # a clone of a shared mount shares already
        mounts.set_propagation(tree, mount["propagation"])
    return tree


def require_propagation(mount: Mount, origin: int) -> None:
    """What is to be propagated must come from a mount that does: "slave" from any but a private one."""
    asked = mount["propagation"]
    if asked == "private":
        return
    found = mounts.propagation_of(origin)
    if found == "private" or (asked == "shared" and found == "slave"):
        raise InvalidArgument(
            f'propagation "{asked}" of {mount["target"]}: host path "{mount["source"]}"'
            f" is on a {found} mount"
        )


# ---- what is the container's ----


def _make_scratch(path: str, label: str) -> Scratch:
    """Over the container's own directory on the node, in this mount namespace only."""
    data = {"mode": "700", **_context(label)}
    mount = mounts.make_filesystem("tmpfs", data, ["nosuid", "noexec"])
    os.mkdir("empty", 0o555, dir_fd=mount)
    os.mknod("null", stat.S_IFCHR | 0o666, os.makedev(1, 3), dir_fd=mount)
    syscalls.move_mount(mount, os.open(path, _DIRECTORY))
    empty = os.open("empty", _DIRECTORY, dir_fd=mount)
    null = os.open("null", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=mount)
    return Scratch(mount, path, empty, null)


def _context(label: str) -> dict[str, str]:
    """The mount option by which all files of a new file system have the label of SELinux, if there is one."""
    return {"context": label} if label else {}


def _mount_point(scratch: Scratch, name: str) -> str:
    os.mkdir(name, 0o755, dir_fd=scratch.mount)
    return f"{scratch.path}/{name}"


def _layer_directories(scratch: Scratch, layers: Layers, maps: IdMaps) -> list[int]:
    """What to make an overlay of; an image may have no layer at all."""
    if not layers.paths:
        return [scratch.empty]
    if maps.is_node:
        return list(layers.directories.values())
    mapped = {
        path: _attach_mapped(scratch, path, directory, maps)
        for path, directory in layers.directories.items()
    }
    names = map(os.path.split, layers.paths)
    return [os.open(name, _DIRECTORY, dir_fd=mapped[parent]) for parent, name in names]


def _attach_mapped(scratch: Scratch, path: str, directory: int, maps: IdMaps) -> int:
    """An idmapped mount of a directory; overlay wants it attached before Linux 6.15."""
    tree = mounts.clone_tree(directory, recursive=False)
    idmaps.map_tree(tree, directory, maps.userns, f'layers "{path}"')
    point = os.open(_mount_point(scratch, f"layers-{directory}"), _DIRECTORY)
    syscalls.move_mount(tree, point)
    return tree


def _forbid_devices(
    root: int, own: list[tuple[Volume, int]], plan: ContainerPlan, maps: IdMaps
) -> None:
    """A device of the image would belong to the root of the user namespace, who gets none of the node's.

    One that is asked for outside of /dev is made in the image's own file system, which has to allow it then.
    """
    if maps.is_node:
        return
    if all(device["path"].startswith("/dev/") for device in plan["devices"]):
        mounts.set_attributes(root, ["nodev"])
    for _, tree in own:
        mounts.set_attributes(tree, ["nodev"])


def _attach_volume(root: int, volume: Volume, tree: int) -> None:
    """While nothing is mounted in the root but others of them, so that what is copied is the image's."""
    what = f"volume of the image at {volume['target']}"
    try:
        target = confined.make_path(root, volume["target"], directory=True)
        if not _is_directory(target):
            raise FailedPrecondition(f"{what}: the image has a file there")
        if os.path.samestat(os.fstat(target), os.fstat(root)):
            return  # by a link of the image to its root, where a volume has no meaning: see `filesystems.image_volumes`
        volumes.fill(tree, target)
        if "label" in volume:
            relabel.relabel_tree(tree, volume["label"], volume["source"])
        syscalls.move_mount(tree, target)
    except OSError as error:
        raise _of_step(what, error) from error
    except ResourceExhausted as error:
        raise ResourceExhausted(f"{what}: {error}") from None


def _execute(assembly: Assembly, mount: Mount, source: Source) -> None:
    try:
        _attach(assembly, mount, _tree(assembly, mount, source))
    except OSError as error:
        raise _of_step(f"mount {describe(mount)}", error) from error


def _of_step(step: str, error: OSError) -> OSError | FailedPrecondition:
    """An error of the kernel, with the step of the plan that it is about."""
    if error.errno in _FAULTS_OF_A_PATH:
        return FailedPrecondition(f"{step}: {os.strerror(error.errno)}")
    return OSError(error.errno, f"{step}: {error.strerror or error}", error.filename)


def _tree(assembly: Assembly, mount: Mount, source: Source) -> int:
    """Read-only file systems of ours are sealed at the end, since mount points may have to be made in them."""
    if mount["kind"] == "bind":
        return source.tree
    if mount["kind"] == "image":
        return _image_tree(assembly, mount, source.layers)
    if _is_own_dev(mount):
        tree = assembly.dev
    elif mount["source"] == "proc" and assembly.procfs != -1:
        tree = assembly.procfs
        mounts.set_attributes(tree, [name for name in mount["attributes"] if name != "ro"])
    else:
        tree = _make_filesystem(mount, assembly.maps)
    if "ro" in mount["attributes"]:
        assembly.sealed.append(tree)
    return tree


def _attach(assembly: Assembly, mount: Mount, tree: int) -> None:
    directory = mount["kind"] == "fs" or _is_directory(tree)
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
    """Nothing is attached to a mount that is shared with the node so that it appears there, and stays there.

    It would cover the node's /dev/pts or /sys/fs/cgroup, for one. What a request mounts in what it shares, and masks,
    are attached apart; what every container has is not attached at all: to take it away again would take away what the
    node has at that place. ours: what errors call a mount of that kind.
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
    """What is mounted in a /dev of our own is reached through that file system, whatever the root has at its place."""
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
            f"mount {describe(mount)}: the path is not there, and leads into a file system in which none can"
            " be made, as procfs is"
        ) from error
    except PermissionError as error:  # sysfs and devpts take nothing new
        raise FailedPrecondition(
            f"mount {describe(mount)}: the path is not there, and cannot be made or reached where it leads:"
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
    """Nothing of a request covers procfs, be it that a link leads there: what counts is what the target is.

    A program of the container that sets a label or a limit would write it into a file of whoever asked for the mount.
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


def _is_directory(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


def _make_filesystem(mount: Mount, maps: IdMaps) -> int:
    attributes = [name for name in mount["attributes"] if name != "ro"]
    data = mount["data"]
    if "gid" in data:
        data = {**data, "gid": str(maps.gid(int(data["gid"])))}
    if "label" not in mount:
        return mounts.make_filesystem(mount["source"], data, attributes)
    return _make_labelled(mount["source"], data, attributes, mount["label"])


def _make_labelled(kind: str, data: dict[str, str], attributes: list[str], label: str) -> int:
    """The mqueue of an IPC namespace is there already, and takes no label as an option: its root is given one."""
    if kind != "mqueue":
        return mounts.make_filesystem(kind, {**data, **_context(label)}, attributes)
    tree = mounts.make_filesystem(kind, data, attributes)
    relabel.relabel_file(tree, label, "/dev/mqueue")
    return tree


def _image_tree(assembly: Assembly, mount: Mount, layers: Layers) -> int:
    """The files of an image, or what is at sub_path in them.

    An overlay needs two layers at least, and what is bound instead of one has no label of its own.
    """
    directories = _layer_directories(assembly.scratch, layers, assembly.maps)
    top = directories[0]
    label = mount.get("label", "")
    if label and len(directories) == 1:
        point = _mount_point(assembly.scratch, f"below-{top}")
        directories.append(os.open(point, _DIRECTORY))
    if len(directories) > 1:
        point = _mount_point(assembly.scratch, f"image-{top}")
        top = mounts.mount_overlay(point, directories, label=label)
    try:
        origin = confined.open_path(top, mount.get("sub_path") or ".")
    except FileNotFoundError as error:
        path = f'path "{mount.get("sub_path")}" of the image for {mount["target"]}'
        raise NotFound(f"{path}: no such file or directory") from error
    tree = mounts.clone_tree(origin)
    mounts.set_attributes(tree, ["ro", *mount["attributes"]], recursive=True)
    return tree


# ---- devices ----


def _is_own_dev(mount: Mount) -> bool:
    """/dev is a new file system, and not something that the request puts there."""
    return mount["kind"] == "fs" and mount["target"] == "/dev"


def _make_dev(plan: ContainerPlan, maps: IdMaps) -> int:
    """The container's own /dev, complete before anybody can reach it; -1 where the request mounts one.

    Devices are made in the descriptor of the detached mount: no path of the container is resolved for them.
    """
    for mount in plan["mounts"]:
        if _is_own_dev(mount):
            try:
                dev = _make_filesystem(mount, maps)
            except OSError as error:
                raise _of_step(f"mount {describe(mount)}", error) from error
            _populate_dev(dev, plan, maps)
            return dev
    return -1


def _populate_dev(dev: int, plan: ContainerPlan, maps: IdMaps) -> None:
    usual = {device["path"]: device for device in rootfs_defaults.DEFAULT_DEVICES}
    asked = {device["path"]: device for device in plan["devices"]}
    parents = {"/dev": dev}
    for path, device in (usual | asked).items():
        if path.startswith("/dev/"):
            parent = os.path.dirname(path)
            if parent not in parents:
                below = parent.removeprefix("/dev/")
                parents[parent] = _device_directory(dev, below, device, follow=False)
            _make_device(parents[parent], device, maps)
    taken = {mount["target"] for mount in plan["mounts"]} | asked.keys() | parents.keys()
    for name, target in rootfs_defaults.DEFAULT_LINKS.items():
        if f"/dev/{name}" not in taken:
            os.symlink(target, name, dir_fd=dev)


def _make_devices_outside_dev(root: int, plan: ContainerPlan, maps: IdMaps) -> None:
    """In the image's own file system, while nothing is mounted in it: a volume never gets one."""
    for device in plan["devices"]:
        if not device["path"].startswith("/dev/"):
            parent = _device_directory(root, os.path.dirname(device["path"]), device, follow=True)
            with suppress(FileExistsError):  # of the image, or of a start that is repeated
                _make_device(parent, device, maps)


def _device_directory(root: int, path: str, device: Device, *, follow: bool) -> int:
    try:
        return confined.make_path(root, path, directory=True, follow=follow)
    except OSError as error:
        raise _of_step(f"device {device['path']}", error) from error


def _require_devices(assembly: Assembly, plan: ContainerPlan) -> None:
    """Asked for, a device is there in the end, be it by what the request mounts over its place.

    A /dev that is not ours may be the node's: nothing is made in it, it has to bring what was asked for.
    """
    if plan["privileged"]:
        return
    usual = {device["path"] for device in rootfs_defaults.DEFAULT_DEVICES}
    for device in plan["devices"]:
        if device["path"] not in usual:
            _require_device(assembly.root, device)


def _require_device(root: int, device: Device) -> None:
    found = _find(root, device["path"])
    if found is None or os.fstat(found).st_rdev != os.makedev(device["major"], device["minor"]):
        raise InvalidArgument(
            f"device {device['path']}: an image or a mount has something else there;"
            " ask for the device at another path"
        )


def _make_device(parent: int, device: Device, maps: IdMaps) -> None:
    name = os.path.basename(device["path"])
    kind = _DEVICE_KINDS[device["type"]]
    number = os.makedev(device["major"], device["minor"])
    uid, gid = device["uid"], device["gid"]
    if not device.get("of_node"):
        uid, gid = maps.uid(uid), maps.gid(gid)
    try:
        os.mknod(name, kind | device["mode"], number, dir_fd=parent)
        os.chown(name, uid, gid, dir_fd=parent, follow_symlinks=False)
    except OSError as error:
        raise _of_step(f"device {device['path']}", error) from error


# ---- masks ----


def _mask(assembly: Assembly, path: str) -> None:
    target = _find(assembly.root, path)
    if target is None:
        return
    mask = assembly.scratch.empty if _is_directory(target) else assembly.scratch.null
    _move_mount(assembly, mounts.clone_tree(mask, recursive=False), target)


def _make_readonly(assembly: Assembly, path: str) -> None:
    target = _find(assembly.root, path)
    if target is None:
        return
    tree = mounts.clone_tree(target)
    mounts.set_attributes(tree, ["ro"], recursive=True)
    _move_mount(assembly, tree, target)


def _find(root: int, path: str) -> int | None:
    """What the container finds there, if it finds something."""
    try:
        return confined.open_path(root, path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, *_FAULTS_OF_A_PATH):
            raise
        return None
