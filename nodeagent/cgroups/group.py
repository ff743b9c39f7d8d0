"""One cgroup: its limits, its processes and its usage. The same object serves cgroup v1, hybrid and v2."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Protocol, TypeVar

from nodeagent.cgroups import descriptors, limits, parse, paths, tree, v1, v2
from nodeagent.cgroups.control import ControlFiles
from nodeagent.cgroups.descriptors import WatchFds
from nodeagent.cgroups.devices import Rule
from nodeagent.cgroups.hierarchy import Layout
from nodeagent.cgroups.parse import Pressure
from nodeagent.cgroups.stats import (
    CgroupStats,
    CpuStats,
    HugetlbStats,
    IoStats,
    MemoryStats,
    PidsStats,
    PressureStats,
)
from nodeagent.cgroups.tracking import LegacyTracker, Tracker, UnifiedTracker
from nodeagent.errors import FailedPrecondition, NotFound
from nodeagent.requests import Resources

_REMOVE_TIMEOUT_S = 2.0

_T = TypeVar("_T")


class Version(Protocol):
    """The functions that the modules `v1` and `v2` have in common."""

    OOM_EVENTS: str

    def apply(self, files: ControlFiles, wanted: Resources, now: Resources) -> None: ...
    def resources(self, files: ControlFiles) -> Resources: ...
    def set_devices(self, files: ControlFiles, rules: Sequence[Rule] | None) -> None: ...
    def cpu(self, files: ControlFiles) -> CpuStats | None: ...
    def memory(self, files: ControlFiles) -> MemoryStats | None: ...
    def pids(self, files: ControlFiles) -> PidsStats | None: ...
    def io(self, files: ControlFiles) -> tuple[IoStats, ...]: ...
    def hugetlb(
        self, files: ControlFiles, page_sizes: Sequence[str]
    ) -> tuple[HugetlbStats, ...]: ...


class Cgroup:
    """The group at `path`, in all hierarchies of the machine.

    Methods block for less than a millisecond, but for `remove`, and for `apply` where memory has to be reclaimed.
    `stats` keeps about 20 files open until `close`.
    """

    def __init__(self, layout: Layout, path: str, page_sizes: Sequence[str] = ()) -> None:
        self.path = path
        self._layout = layout
        self._page_sizes = page_sizes
        self._version: Version = v1 if layout.legacy else v2
        self._own = layout.hierarchies
        self._tracking = layout.hierarchies[0]
        self._tracker = _tracker(layout, path)
        self._files = ControlFiles(_directories(layout, path))
        self._fence = path if layout.legacy else paths.fence(path)
        self._pressure = ControlFiles({"": self._tracking.directory(path)})
        self._lock = threading.Lock()
        self._left: list[Cgroup] = []
        self._leaving = threading.Lock()

    def __repr__(self) -> str:
        return f"Cgroup({self.path!r})"

    def exists(self) -> bool:
        return os.path.isdir(self._tracking.directory(self.path))

    # --- limits ---

    def apply(self, resources: Resources) -> None:
        """Put `resources` in force; on failure the earlier limits stay. What is not set is not changed.

        Raises InvalidArgument for nonsense, FailedPrecondition for what the present use forbids (a memory limit
        below it), Unsupported for what this kernel lacks (not where no limit is asked for), NotFound without the group.
        """
        limits.check(resources)
        now = self._version.resources(self._files)
        self._version.apply(self._files, resources, now)

    def set_devices(self, rules: Sequence[Rule] | None) -> None:
        """Allow only the devices of `rules`; None allows all that the groups above allow.

        On v2 a container's rules are those of the group above its own: see `paths.fence`.
        """
        self._require_own()
        self._version.set_devices(ControlFiles(_directories(self._layout, self._fence)), rules)

    def delegate(self, uid: int) -> None:
        """Let a user of the node manage the groups below this one: v2 only, see `v2.delegate`."""
        self._require_own()
        v2.delegate(self._tracking.directory(self.path), uid)

    # --- processes ---

    def join_fds(self) -> list[int]:
        """Open the files by which a process joins the group; the caller closes them. Raises NotFound.

        On cgroup2 a directory comes first, for CLONE_INTO_CGROUP. The others are `tasks` files of v1 hierarchies: the
        process writes "0" to each while it has a single thread. (A "0" written to `tasks` takes no system-wide lock;
        `cgroup.procs` does, and waits for an RCU grace period.) A hybrid has both.
        """
        return descriptors.join_fds(
            self._layout, dict.fromkeys(self._layout.hierarchies, self.path)
        )

    def watch_fds(self) -> WatchFds:
        """Open the files by which a supervisor watches the group. Raises NotFound."""
        last = self._own[-1].directory(
            self.path
        )  # in the first of several, execs have groups of their own
        unified = self._layout.unified
        kill = f"{unified.directory(self.path)}/cgroup.kill" if unified else None
        events = self._version.OOM_EVENTS
        oom = self._files.path(events) if self._files.has(events) else None
        with ExitStack() as undo:
            fds = WatchFds(
                oom=descriptors.open_file(undo, oom, os.O_RDONLY) if oom else None,
                procs=descriptors.open_file(undo, f"{last}/cgroup.procs", os.O_RDONLY),
                kill=descriptors.open_file(undo, kill, os.O_WRONLY) if kill else None,
            )
            undo.pop_all()
            return fds

    def processes(self) -> list[int]:
        """The pids in the group and in those below it, as far as this PID namespace sees them."""
        return self._tracker.processes()

    def populated(self) -> bool:
        return self._tracker.populated()

    def kill(self) -> None:
        """Send SIGKILL to all processes, those of execs included. Does not wait for their end."""
        self._require_own()
        self._tracker.kill()

    def thaw(self) -> None:
        """Thaw all processes, whoever froze them; in a hybrid, those in v1's freezer as well."""
        self._require_own()
        self._tracker.thaw()

    def child(self, name: str) -> "Cgroup":
        """Make a group for one exec, whose processes can then be killed alone.

        Raises AlreadyExists, and NotFound without this group.
        """
        child = ExecGroup(self._layout, self.path, paths.check_name(name))
        child.make()
        return child

    def discard(self, child: "Cgroup") -> None:
        """Remove the group of an exec that has ended.

        Where processes are left in it, or still dying, it is removed with a later one, or with this group.
        """
        with self._leaving:
            self._left = [group for group in (*self._left, child) if not _removed(group)]

    def take_over_execs(self) -> None:
        """Note the groups of execs that an agent before has left, so that `discard` removes those that have ended."""
        directory = self._tracking.directory(self.path)
        with self._leaving:
            self._left += [
                ExecGroup(self._layout, self.path, name)
                for name in tree.groups_in(directory)
                if tree.kind(f"{directory}/{name}") == tree.GROUP
            ]

    # --- accounting ---

    def stats(self) -> CgroupStats:
        """Read the usage. What a single controller cannot tell is missing, and fails nothing else. Raises NotFound."""
        with self._lock:
            cpu = _part(None, self._version.cpu, self._files)
            if cpu is None and not self.exists():
                raise NotFound(f'cgroup "{self.path}": does not exist')
            return CgroupStats(
                at_ns=time.time_ns(),
                cpu=cpu,
                memory=_part(None, self._version.memory, self._files),
                pids=_part(None, self._version.pids, self._files),
                io=_part((), self._version.io, self._files),
                hugetlb=_part((), self._version.hugetlb, self._files, self._page_sizes),
                pressure=PressureStats(
                    cpu=_part(None, _sample_pressure, self._pressure, "cpu.pressure"),
                    memory=_part(None, _sample_pressure, self._pressure, "memory.pressure"),
                    io=_part(None, _sample_pressure, self._pressure, "io.pressure"),
                ),
            )

    def close(self) -> None:
        """Close the files that `stats` keeps; the next one opens them again."""
        with self._lock:
            self._files.close()
            self._pressure.close()

    # --- life ---

    def make(self, resources: Resources) -> None:
        """Make the group in every hierarchy, with its limits, or nothing. Raises AlreadyExists, and as `apply`."""
        limits.check(resources)
        with ExitStack() as undo:
            for hierarchy in self._own:
                # Undone in reverse: the group first, then the parents, which `tree.make` may leave behind by itself.
                undo.callback(tree.remove_empty_parents, hierarchy.mount, self.path)
                tree.make(hierarchy.mount, self.path)
                # The deadline has passed by then: a group that was just made has no processes to wait for.
                undo.callback(
                    tree.remove, hierarchy.mount, self.path, self._fence, time.monotonic()
                )
                if "cpuset" in hierarchy.controllers and self._version is v1:
                    v1.fill_cpuset(hierarchy.mount, self.path)
            if self._version is v2:
                wanted = v2.CONTROLLERS & self._layout.controllers
                v2.enable(self._tracking.mount, self.path, wanted)
                if self._fence != self.path:
                    v2.limit_descendants(self._tracking.directory(self._fence))
            self._version.apply(self._files, resources, limits.NEW)
            undo.pop_all()

    def remove(self, timeout_s: float = _REMOVE_TIMEOUT_S) -> None:
        """Remove the group, those below it, and empty parents that were made for it. May be repeated.

        Kills nothing; waits up to `timeout_s` for processes that are ending. Raises FailedPrecondition where some stay,
        and for a group that this agent did not make.
        """
        deadline = time.monotonic() + timeout_s
        try:
            for hierarchy in self._own:
                tree.remove(hierarchy.mount, self.path, self._fence, deadline)
                tree.remove_empty_parents(hierarchy.mount, self.path)
        finally:
            self.close()

    def end(self) -> None:
        """Kill what is in the group, also what no supervisor knew of, and remove it. Raises as `remove`.

        An agent that is killed while it makes a group leaves one that is in some hierarchies only, maybe not in the
        one which tells whether a group exists. That goes as well.
        """
        if self.exists() and self.populated():
            self.kill()
        self.remove()

    def _require_own(self) -> None:
        tree.require_group(self._tracking.mount, self.path, self._fence)


class ExecGroup(Cgroup):
    """The group of one exec: one of its own in the first hierarchy, the container's in all others.

    Limits and accounting are the container's; this group has none.
    """

    def __init__(self, layout: Layout, container: str, name: str) -> None:
        super().__init__(layout, f"{container}/{name}")
        self._container = container
        if not layout.legacy:
            self._fence = paths.fence(container)
        self._own = layout.hierarchies[:1]
        if layout.legacy:
            self._files = ControlFiles({})

    def make(self, resources: Resources = limits.NOTHING) -> None:
        """Make the group without controllers: on v2 the container's processes forbid them.

        A group with processes cannot pass controllers on (cgroup-v2.rst, "No Internal Process Constraint").
        """
        tree.make_in(self._tracking.mount, self.path)

    def join_fds(self) -> list[int]:
        paths = dict.fromkeys(self._layout.hierarchies, self._container)
        return descriptors.join_fds(self._layout, paths | {self._tracking: self.path})


def _removed(group: Cgroup) -> bool:
    try:
        group.remove(timeout_s=0)
    except FailedPrecondition:
        return False
    return True


def _tracker(layout: Layout, path: str) -> Tracker:
    hierarchy = layout.hierarchies[0]
    if layout.unified:
        freezers = [h.directory(path) for h in layout.legacy if "freezer" in h.controllers]
        return UnifiedTracker(hierarchy.directory(path), *freezers)
    return LegacyTracker(hierarchy.directory(path), freezer="freezer" in hierarchy.controllers)


def _directories(layout: Layout, path: str) -> dict[str, str]:
    """The directory of each controller's files; "" is for all of them."""
    if layout.unified and not layout.legacy:
        return {"": layout.unified.directory(path)}
    return {name: h.directory(path) for h in layout.legacy for name in h.controllers}


def _part(missing: _T, read: Callable[..., _T], *arguments: object) -> _T:
    """Read a part of the statistics; `missing` where the kernel's text is not as expected."""
    try:
        return read(*arguments)
    except (ValueError, KeyError):
        return missing


def _sample_pressure(files: ControlFiles, name: str) -> Pressure | None:
    data = files.sample(name)
    return None if data is None else parse.pressure(data)
