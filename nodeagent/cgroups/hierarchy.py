"""The mounted cgroup hierarchies, and what each of them controls (cgroups(7)).

Three forms exist: "v2" has one tree for everything; "v1" has a tree per controller, or set of controllers, and a named
one that controls nothing; "hybrid" is v1 with an additional cgroup2 that only keeps track of processes.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from nodeagent.linux.mountinfo import Mount

Kind = Literal["v1", "hybrid", "v2"]

V1_CONTROLLERS = frozenset(
    {"blkio", "cpu", "cpuacct", "cpuset", "debug", "devices", "freezer", "hugetlb", "memory"}
    | {"misc", "net_cls", "net_prio", "perf_event", "pids", "rdma"}
)
_CGROUP2_FLAGS = frozenset(
    {"nsdelegate", "favordynmods", "memory_localevents", "memory_recursiveprot"}
    | {"memory_hugetlb_accounting", "pids_localevents"}
)


@dataclass(frozen=True, slots=True)
class ContainerMount:
    """A mount by which a container sees its own groups, inside a cgroup namespace.

    name: a directory below the container's /sys/fs/cgroup, "" for that directory itself; `links` point to it.
    """

    name: str
    type: Literal["cgroup", "cgroup2"]
    options: str
    links: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """One tree, mounted at `mount`. options: the mount data that give the same tree again."""

    mount: str
    controllers: frozenset[str]
    options: str

    def directory(self, path: str) -> str:
        return self.mount + path

    @property
    def delegates(self) -> bool:
        return "nsdelegate" in self.options.split(",")

    def container_mount(self) -> ContainerMount:
        name = os.path.basename(self.mount)
        links = tuple(sorted(self.controllers - {name})) if "," in name else ()
        return ContainerMount(name, "cgroup", self.options, links)


@dataclass(frozen=True)
class Layout:
    """The hierarchies of a machine. `unified` is None on v1, `legacy` is empty on v2."""

    unified: Hierarchy | None
    legacy: tuple[Hierarchy, ...]

    @property
    def kind(self) -> Kind:
        if not self.legacy:
            return "v2"
        return "hybrid" if self.unified else "v1"

    @cached_property
    def hierarchies(self) -> tuple[Hierarchy, ...]:
        """All hierarchies; the first is the one that tells which processes a group has."""
        if self.unified:
            return (self.unified, *self.legacy)
        return tuple(sorted(self.legacy, key=lambda h: "freezer" not in h.controllers))

    @cached_property
    def controllers(self) -> frozenset[str]:
        """The controllers that limit and account; the cgroup2 of a hybrid does neither."""
        if self.unified and not self.legacy:
            return self.unified.controllers
        return frozenset().union(*(h.controllers for h in self.legacy))

    def mounts(self) -> tuple[ContainerMount, ...]:
        """The mounts for a container: on v2 the one tree, else the v1 trees, each in a directory of a tmpfs."""
        if self.unified and not self.legacy:
            return (ContainerMount("", "cgroup2", self.unified.options),)
        return tuple(h.container_mount() for h in self.legacy)


def detect(root: str, mounts: Iterable[Mount]) -> Layout:
    """The hierarchies mounted at `root`, or directly below it. The first mount of a tree is taken."""
    unified: Hierarchy | None = None
    legacy: dict[str, Hierarchy] = {}
    for mount in mounts:
        point, options = mount.point, mount.options.split(",")
        if point != root and os.path.dirname(point) != root:
            continue
        if mount.kind == "cgroup2" and unified is None:
            unified = _unified(point, options)
        elif mount.kind == "cgroup":
            hierarchy = _legacy(point, options)
            legacy.setdefault(hierarchy.options, hierarchy)
    return Layout(unified, tuple(legacy.values()))


def _unified(mount: str, options: list[str]) -> Hierarchy:
    with open(f"{mount}/cgroup.controllers", encoding="ascii") as file:
        controllers = frozenset(file.read().split())
    return Hierarchy(mount, controllers, ",".join(o for o in options if o in _CGROUP2_FLAGS))


def _legacy(mount: str, options: list[str]) -> Hierarchy:
    controllers = [option for option in options if option in V1_CONTROLLERS]
    names = [option for option in options if option.startswith("name=")]
    data = ",".join(controllers + names if controllers else ["none", *names])
    return Hierarchy(mount, frozenset(controllers), data)
