"""Cgroups, which outlive the agent, and the agent's side of them."""

import time
from typing import Any, cast

from nodeagent.cgroups import paths as cgroup_paths
from nodeagent.cgroups.descriptors import WatchFds
from nodeagent.cgroups.stats import CgroupStats, PressureStats
from nodeagent.errors import AlreadyExists, FailedPrecondition, NotFound
from tests.chaos.simulation import world
from tests.chaos.simulation.containers import KILLED, Container, Init

INSTANCE = "00000000"


class Group:
    """A cgroup, which outlives the agent."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.members: dict[Container | Init, None] = {}


class Handle:
    """A cgroup as the agent has it: `nodeagent.cgroups.group.Cgroup`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._left: list[Handle] = []

    def _group(self) -> Group:
        group = world.machine.groups.get(self.path)
        if group is None:
            raise NotFound(f'cgroup "{self.path}": does not exist')
        return cast(Group, group)

    def exists(self) -> bool:
        return self.path in world.machine.groups

    def make(self) -> None:
        world.machine.step("cgroups.make", self.path)
        if self.path in world.machine.groups:
            raise AlreadyExists(f'cgroup "{self.path}": exists already')
        world.machine.groups[self.path] = Group(self.path)
        world.machine.step("made")

    def apply(self, _resources: object) -> None:
        world.machine.step("cgroups.apply", self.path)
        self._group()

    def set_devices(self, _rules: object) -> None:
        world.machine.step("cgroups.devices", self.path)
        self._group()

    def delegate(self, _uid: int) -> None:
        self._group()

    def join_fds(self) -> list[int]:
        world.machine.step("cgroups.join", self.path)
        return [world.machine.new_fd(self._group())]

    def watch_fds(self) -> WatchFds:
        return WatchFds(oom=None, procs=cast(Any, None), kill=None)

    def processes(self) -> list[int]:
        return [member.pid for member in self._group().members]

    def kill(self) -> None:
        world.machine.step("cgroups.kill", self.path)
        for member in list(self._group().members):
            member.kill()

    def thaw(self) -> None:
        self._group()

    def child(self, name: str) -> "Handle":
        self._group()
        child = Handle(f"{self.path}/{name}")
        child.make()
        return child

    def discard(self, child: "Handle") -> None:
        left, self._left = [*self._left, child], []
        for group in left:
            try:
                group.end()
            except (FailedPrecondition, OSError):
                self._left.append(group)

    def take_over_execs(self) -> None:
        self._left += [
            Handle(path) for path in world.machine.groups if path.startswith(f"{self.path}/")
        ]

    def stats(self) -> CgroupStats:
        self._group()
        pressure = PressureStats(cpu=None, memory=None, io=None)
        return CgroupStats(
            at_ns=time.time_ns(),
            cpu=None,
            memory=None,
            pids=None,
            io=(),
            hugetlb=(),
            pressure=pressure,
        )

    def close(self) -> None:
        """Nothing is open."""

    def end(self) -> None:
        world.machine.step("cgroups.end", self.path)
        below = [p for p in world.machine.groups if p == self.path or p.startswith(f"{self.path}/")]
        members = [member for path in below for member in world.machine.groups[path].members]
        for member in members:
            if member.hangs_until > world.machine.loop.time():
                member.kill()
                raise FailedPrecondition(f'cgroup "{self.path}": has processes')
        for member in members:
            member.end(KILLED)
        for path in below:
            del world.machine.groups[path]
        world.machine.step("ended")


class SimulatedCgroups:
    """`nodeagent.cgroups.manager.Cgroups`."""

    driver = "cgroupfs"
    hierarchy = "v2"
    delegates = False
    controllers = frozenset({"cpu", "memory", "pids"})
    default_parent = f"/nodeagent-{INSTANCE}"

    def covered(self) -> str:
        return ""

    def mounts(self) -> tuple[()]:
        return ()

    def parent_path(self, parent: str) -> str:
        return cgroup_paths.parent(parent)

    def container_path(self, parent: str, container_id: str) -> str:
        return cgroup_paths.container(parent or self.default_parent, container_id)

    def pod_path(self, pod_id: str) -> str:
        return cgroup_paths.pod(self.default_parent, pod_id)

    def of_pods_without_parent(self) -> dict[str, str]:
        below = (path.split("/") for path in world.machine.groups)
        return {"/".join(each): each[3] for each in below if len(each) == 4}

    def create(self, path: str, _resources: object = None) -> Handle:
        handle = Handle(path)
        handle.make()
        return handle

    def open_existing(self, path: str) -> Handle:
        handle = Handle(path)
        handle._group()
        return handle

    def end(self, path: str) -> None:
        Handle(path).end()

    def instance_group(self) -> Handle:
        handle = Handle(f"{self.default_parent}/agent")
        if not handle.exists():
            handle.make()
        return handle

    def remove_instance(self) -> None:
        Handle(f"{self.default_parent}/agent").end()
