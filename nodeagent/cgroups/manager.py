"""The cgroups of a machine: the paths of containers' groups, making them, finding them again."""

import os
import re
from typing import Literal, Protocol

from nodeagent.cgroups import hierarchy, limits, paths, systemd, tree
from nodeagent.cgroups.covering import Watched
from nodeagent.cgroups.group import Cgroup
from nodeagent.cgroups.hierarchy import ContainerMount, Kind, Layout
from nodeagent.errors import NotFound, Unsupported
from nodeagent.linux import mountinfo
from nodeagent.requests import Resources

Driver = Literal["cgroupfs", "systemd"]

HUGEPAGES = "/sys/kernel/mm/hugepages"

_ID = re.compile(r"[0-9a-f]{64}")


class Names(Protocol):
    """The functions that the modules `paths` (for cgroupfs) and `systemd` have in common."""

    def parent(self, path: str) -> str: ...
    def container(self, parent: str, container_id: str) -> str: ...
    def pod(self, default_parent: str, pod_id: str) -> str: ...


class Cgroups:
    """The cgroups of a machine. default_parent: of pods without one; layout: as `hierarchy.detect` finds it."""

    def __init__(self, layout: Layout, *, driver: Driver, default_parent: str) -> None:
        self.driver: Driver = driver
        self._layout = layout
        self._watched = [Watched(hierarchy) for hierarchy in layout.hierarchies]
        self._names: Names = systemd if driver == "systemd" else paths
        self.default_parent = paths.check(default_parent)
        if driver == "systemd":
            self.default_parent = systemd.as_slice(self.default_parent)
        self._page_sizes = _page_sizes() if "hugetlb" in layout.controllers else ()

    @classmethod
    def open(
        cls,
        *,
        driver: Driver | Literal["auto"],
        default_parent: str,
        root: str = "/sys/fs/cgroup",
    ) -> "Cgroups":
        """Find the hierarchies at `root`; "auto" is the systemd driver on cgroup v2 where systemd is init.

        Raises Unsupported where no cgroup hierarchy is mounted at `root`.
        """
        layout = hierarchy.detect(root, mountinfo.parse(mountinfo.table()))
        if not layout.hierarchies:
            raise Unsupported(f"{root}: no cgroup hierarchy is mounted there; mount cgroup2")
        if driver == "auto":
            driver = "systemd" if layout.kind == "v2" and systemd.manages_node() else "cgroupfs"
        return cls(layout, driver=driver, default_parent=default_parent)

    @property
    def hierarchy(self) -> Kind:
        return self._layout.kind

    @property
    def controllers(self) -> frozenset[str]:
        """The controllers by their kernel names: io is blkio on v1, and only v1 has cpuacct and devices."""
        return self._layout.controllers

    def covered(self) -> str:
        """The mount point of a hierarchy that another mount covers, "" where none is. May block, where that does."""
        return next((root.mount for root in self._watched if root.is_covered()), "")

    def mounts(self) -> tuple[ContainerMount, ...]:
        """The mounts by which a container sees its own groups."""
        return self._layout.mounts()

    @property
    def delegates(self) -> bool:
        """Whether the root group of a cgroup namespace bounds whoever manages the groups below it (nsdelegate)."""
        unified = self._layout.unified
        return self._layout.kind == "v2" and unified is not None and unified.delegates

    def parent_path(self, parent: str) -> str:
        """The whole path of a parent that a caller names. Raises InvalidArgument for a malformed one."""
        return self._names.parent(parent)

    def container_path(self, parent: str, container_id: str) -> str:
        """The path of a container's group below `parent`, or below the default parent if that is empty.

        Raises InvalidArgument for a parent that is not an absolute, clean path or, with systemd, not a slice.
        """
        path = self._names.container(parent or self.default_parent, container_id)
        return path if self._layout.legacy else f"{path}/{paths.INNER}"

    def pod_path(self, pod_id: str) -> str:
        """The parent for containers of a pod without one; it is made with the first of them."""
        return self._names.pod(self.default_parent, pod_id)

    def of_pods_without_parent(self) -> dict[str, str]:
        """The agent's groups two levels below the default parent, where such pods have theirs: ids by their paths.

        The id is that of a container, or of a pod whose own process is in the group.
        """
        found: dict[str, str] = {}
        for root in self._layout.hierarchies:
            top = f"{root.mount}{self.default_parent}"
            for pod in filter(_ID.search, tree.groups_in(top)):
                for name in tree.groups_in(f"{top}/{pod}"):
                    is_ours = tree.kind(f"{top}/{pod}/{name}") is not None
                    if is_ours and (container_id := _ID.search(name)):
                        group = f"{self.default_parent}/{pod}/{name}"
                        path = group if self._layout.legacy else f"{group}/{paths.INNER}"
                        found[path] = container_id[0]
        return found

    def create(self, path: str, resources: Resources = limits.NOTHING) -> Cgroup:
        """Make a group with its limits, and the groups above it that are missing, or nothing.

        Raises AlreadyExists, and as `Cgroup.apply`.
        """
        group = self._group(path)
        group.make(resources)
        return group

    def open_existing(self, path: str) -> Cgroup:
        """Open a group whoever made it; limits and accounting can be used in any case. Raises NotFound."""
        group = self._group(path)
        if not group.exists():
            raise NotFound(f'cgroup "{path}": does not exist')
        return group

    def end(self, path: str) -> None:
        """Kill what is in a group, and remove it: see `Cgroup.end`."""
        self._group(path).end()

    def instance_group(self) -> Cgroup:
        """Make or find again the group for processes of the agent itself, in the default parent.

        Raises FailedPrecondition for one that others made.
        """
        group = self._group(self._instance_path)
        if group.exists():
            tree.require_group(self._layout.hierarchies[0].mount, group.path, group.path)
            return group
        group.make(limits.NOTHING)
        return group

    def remove_instance(self) -> None:
        """Remove the agent's own group, and the default parent if nothing else is in it. Raises as `Cgroup.remove`."""
        self._group(self._instance_path).remove()

    @property
    def _instance_path(self) -> str:
        return f"{self.default_parent}/agent"

    def _group(self, path: str) -> Cgroup:
        return Cgroup(self._layout, paths.check(path), self._page_sizes)


def _page_sizes() -> tuple[str, ...]:
    """The sizes of huge pages as the hugetlb controller names them; the directories are named hugepages-2048kB."""
    try:
        names = os.listdir(HUGEPAGES)
    except FileNotFoundError:
        return ()
    return tuple(_page_size(int(name[len("hugepages-") : -len("kB")])) for name in sorted(names))


def _page_size(kib: int) -> str:
    if kib >= 1 << 20:
        return f"{kib >> 20}GB"
    return f"{kib >> 10}MB" if kib >= 1 << 10 else f"{kib}KB"
