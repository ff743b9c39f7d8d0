"""The layers below a container's root file system, and those of an image that is mounted as a volume.

In a user namespace they are idmapped mounts, which before Linux 6.15 overlay takes only if they are attached: to a
small file system of ours, `Scratch`, that no path of the container leads to.
"""

import os
import stat
from typing import NamedTuple

from nodeagent import files
from nodeagent.errors import NotFound
from nodeagent.linux import confined, mounts, syscalls
from nodeagent.sandbox import idmaps
from nodeagent.sandbox.idmaps import IdMaps
from nodeagent.sandbox.init.filesystems import context
from nodeagent.sandbox.init.steps import DIRECTORY
from nodeagent.sandbox.spec import Mount, Rootfs


class Layers(NamedTuple):
    """Layers by their paths, uppermost first, and what is open of them: each, or what holds them if they are mapped."""

    paths: tuple[str, ...]
    directories: dict[str, int]


class Scratch(NamedTuple):
    """A small file system of ours that no path of the container leads to.

    It has room for mount points, and what masks are made of: an empty directory and a null device.
    """

    mount: int
    path: str
    empty: int
    null: int


def open_layers(paths: list[str], maps: IdMaps) -> Layers:
    opened = paths if maps.is_node else [os.path.dirname(path) for path in paths]
    return Layers(tuple(paths), {path: os.open(path, DIRECTORY) for path in dict.fromkeys(opened)})


def open_own_layers(plan: Rootfs, maps: IdMaps) -> tuple[int, int]:
    """The upper and work directories.

    A repeated start mounts them again, which the kernel refuses while there is what a volatile overlay has left in
    `work` (overlayfs.rst, "Volatile mount").
    """
    leftover = os.path.join(plan["work"], "work")
    if os.path.exists(leftover):
        files.remove_tree(leftover)
    if not maps.is_node:
        # The root directory of an overlay shows the owner of its upper directory.
        os.chown(plan["upper"], maps.uid(0), maps.gid(0))
    return os.open(plan["upper"], DIRECTORY), os.open(plan["work"], DIRECTORY)


def make_scratch(path: str, label: str) -> Scratch:
    """Mount it over the container's own directory on the node, in this mount namespace only."""
    data = {"mode": "700", **context(label)}
    # Not nodev, as a mask of it would not be a null device then.
    mount = mounts.make_filesystem("tmpfs", data, ["nosuid", "noexec"])
    os.mkdir("empty", 0o555, dir_fd=mount)
    os.mknod("null", stat.S_IFCHR | 0o666, os.makedev(1, 3), dir_fd=mount)
    syscalls.move_mount(mount, os.open(path, DIRECTORY))
    empty = os.open("empty", DIRECTORY, dir_fd=mount)
    null = os.open("null", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=mount)
    return Scratch(mount, path, empty, null)


def mount_point(scratch: Scratch, name: str) -> str:
    os.mkdir(name, 0o755, dir_fd=scratch.mount)
    return f"{scratch.path}/{name}"


def layer_directories(scratch: Scratch, layers: Layers, maps: IdMaps) -> list[int]:
    """The directories to make an overlay of; an image may have no layer at all."""
    if not layers.paths:
        return [scratch.empty]
    if maps.is_node:
        return list(layers.directories.values())
    mapped = {
        path: _attach_mapped(scratch, path, directory, maps)
        for path, directory in layers.directories.items()
    }
    names = map(os.path.split, layers.paths)
    return [os.open(name, DIRECTORY, dir_fd=mapped[parent]) for parent, name in names]


def _attach_mapped(scratch: Scratch, path: str, directory: int, maps: IdMaps) -> int:
    """An idmapped mount of a directory; overlay wants it attached before Linux 6.15."""
    tree = mounts.clone_tree(directory, recursive=False)
    idmaps.map_tree(tree, directory, maps.userns, f'layers "{path}"')
    point = os.open(mount_point(scratch, f"layers-{directory}"), DIRECTORY)
    syscalls.move_mount(tree, point)
    return tree


def image_tree(scratch: Scratch, maps: IdMaps, mount: Mount, layers: Layers) -> int:
    """The files of an image, or what is at sub_path in them.

    An overlay without an upper directory needs two layers at least. One layer is bound instead, which could have no
    label of its own: for a label, an empty layer is put below it.
    """
    directories = layer_directories(scratch, layers, maps)
    top = directories[0]
    label = mount.get("label", "")
    if label and len(directories) == 1:
        point = mount_point(scratch, f"below-{top}")
        directories.append(os.open(point, DIRECTORY))
    if len(directories) > 1:
        point = mount_point(scratch, f"image-{top}")
        top = mounts.mount_overlay(point, directories, label=label)
    try:
        origin = confined.open_path(top, mount.get("sub_path") or ".")
    except FileNotFoundError as error:
        path = f'path "{mount.get("sub_path")}" of the image for {mount["target"]}'
        raise NotFound(f"{path}: no such file or directory") from error
    tree = mounts.clone_tree(origin)
    mounts.set_attributes(tree, ["ro", *mount["attributes"]], recursive=True)
    return tree
