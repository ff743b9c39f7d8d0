"""Device nodes: the container's own /dev, complete before anybody can reach it, and those outside of it."""

import os
import stat
from contextlib import suppress

from nodeagent.errors import InvalidArgument
from nodeagent.linux import confined
from nodeagent.sandbox import rootfs_defaults
from nodeagent.sandbox.idmaps import IdMaps
from nodeagent.sandbox.init.filesystems import make_filesystem
from nodeagent.sandbox.init.steps import find, of_step
from nodeagent.sandbox.rootfs_defaults import describe
from nodeagent.sandbox.spec import ContainerPlan, Device, Mount

_DEVICE_KINDS = {"c": stat.S_IFCHR, "b": stat.S_IFBLK}


def is_own_dev(mount: Mount) -> bool:
    """Whether this is the new file system at /dev, and not something that the request puts there."""
    return mount["kind"] == "fs" and mount["target"] == "/dev"


def make_dev(plan: ContainerPlan, maps: IdMaps) -> int:
    """The container's own /dev, complete before anybody can reach it; -1 where the request mounts one.

    Devices are made in the descriptor of the detached mount: no path of the container is resolved for them.
    """
    for mount in plan["mounts"]:
        if is_own_dev(mount):
            try:
                dev = make_filesystem(mount, maps)
            except OSError as error:
                raise of_step(f"mount {describe(mount)}", error) from error
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


def make_devices_outside_dev(root: int, plan: ContainerPlan, maps: IdMaps) -> None:
    """Make them in the image's own file system, while nothing is mounted in it: a volume never gets one."""
    for device in plan["devices"]:
        if not device["path"].startswith("/dev/"):
            parent = _device_directory(root, os.path.dirname(device["path"]), device, follow=True)
            with suppress(FileExistsError):  # of the image, or of a start that is repeated
                _make_device(parent, device, maps)


def _device_directory(root: int, path: str, device: Device, *, follow: bool) -> int:
    try:
        return confined.make_path(root, path, directory=True, follow=follow)
    except OSError as error:
        raise of_step(f"device {device['path']}", error) from error


def require_devices(root: int, plan: ContainerPlan) -> None:
    """Require that each requested device is there in the end, even if by what the request mounts over its place.

    A /dev that the request mounts may be the node's: nothing is made in it, it has to bring what was asked for.
    """
    if plan["privileged"]:
        return
    usual = {device["path"] for device in rootfs_defaults.DEFAULT_DEVICES}
    for device in plan["devices"]:
        if device["path"] not in usual:
            _require_device(root, device)


def _require_device(root: int, device: Device) -> None:
    found = find(root, device["path"])
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
        raise of_step(f"device {device['path']}", error) from error
