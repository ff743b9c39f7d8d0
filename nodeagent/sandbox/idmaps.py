"""Mappings between the ids of a user namespace and those of the node, of processes and of files.

The image's layers, and volumes that ask for it, are seen through idmapped mounts (mount_setattr(2)): what belongs to
id n there belongs to id n of the namespace. What the runtime makes for a container is made as the container's root.
"""

import os
from typing import NamedTuple

from nodeagent.errors import SHORTAGES, FailedPrecondition, InvalidArgument, Unsupported
from nodeagent.linux import mounts, syscalls, userns
from nodeagent.linux.userns import Extent
from nodeagent.sandbox.spec import IdMap, Mount, PodPlan, ProcessPlan


class IdMaps(NamedTuple):
    """A user namespace and its mappings; the node's own namespace is -1."""

    userns: int
    uids: tuple[Extent, ...] = ()
    gids: tuple[Extent, ...] = ()

    @property
    def is_node(self) -> bool:
        return self.userns == -1

    def uid(self, inside: int) -> int:
        """The id on the node; `InvalidArgument` where it is not mapped."""
        return self._outside("uid", inside, self.uids)

    def gid(self, inside: int) -> int:
        return self._outside("gid", inside, self.gids)

    def _outside(self, kind: str, inside: int, extents: tuple[Extent, ...]) -> int:
        if self.is_node:
            return inside
        try:
            return userns.outside(inside, extents)
        except ValueError:
            text = f"{kind} {inside}: not mapped in the user namespace of the pod"
            raise InvalidArgument(text) from None


def of_process(plan: ProcessPlan, descriptor: int) -> IdMaps:
    """The mappings of a process. descriptor: of the pod's user namespace, -1 without one.

    A process whose plan has mappings never gets the node's namespace instead.
    """
    if descriptor == -1 and "uid_map" in plan:
        raise FailedPrecondition("the pod's user namespace is gone")
    return IdMaps(descriptor, extents(plan.get("uid_map", [])), extents(plan.get("gid_map", [])))


def root_of(plan: PodPlan) -> tuple[int, int]:
    """The user and group of the pod's root on the node."""
    if "uid_map" not in plan:
        return 0, 0
    uids, gids = extents(plan["uid_map"]), extents(plan["gid_map"])
    return userns.outside(0, uids), userns.outside(0, gids)


def groups_of(plan: PodPlan) -> tuple[Extent, ...]:
    """The map of groups of the pod's user namespace; empty without one."""
    return extents(plan.get("gid_map", []))


def extents(lines: list[IdMap]) -> tuple[Extent, ...]:
    return tuple(Extent(line["inside"], line["outside"], line["length"]) for line in lines)


def act_as_root(maps: IdMaps) -> None:
    """Make files as the root of the container, with the capabilities of the node's root (setfsuid(2))."""
    if maps.is_node:
        return
    # Without it a file system id other than 0 takes CAP_DAC_OVERRIDE and its like from the effective set
    # (capabilities(7), "Effect of user ID changes").
    syscalls.prctl(syscalls.PR_SET_SECUREBITS, syscalls.SECBIT_NO_SETUID_FIXUP)
    syscalls.setfsgid(maps.gid(0))
    syscalls.setfsuid(maps.uid(0))


def map_volume(tree: int, origin: int, mount: Mount, maps: IdMaps) -> None:
    """Map a detached tree, a clone of `origin`, as the mount asks for, if it does."""
    uids, gids = extents(mount.get("uid_map", [])), extents(mount.get("gid_map", []))
    if not uids and not gids:
        return
    what = f'host path "{mount["source"]}" for {mount["target"]}'
    if (uids, gids) == (maps.uids, maps.gids) and not maps.is_node:
        map_tree(tree, origin, maps.userns, what)
        return
    descriptor = userns.create(uids, gids)[syscalls.CLONE_NEWUSER]
    map_tree(tree, origin, descriptor, what)
    os.close(descriptor)


def map_tree(tree: int, origin: int, descriptor: int, what: str) -> None:
    """Map a tree. Raises `Unsupported`, with the file system, where the kernel cannot map one that is in it."""
    try:
        mounts.map_ids(tree, descriptor)
    except OSError as error:
        if error.errno in SHORTAGES:
            raise
        kind = mounts.filesystem_of(origin)
        raise Unsupported(f"idmapped mount of {what}: {kind}: {error.strerror}") from error
