"""The agent on the simulated machine: the real composition, on parts whose kernel is the machine."""

import asyncio
import errno
import os
import secrets
import signal
import sqlite3
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from functools import partial
from ipaddress import ip_network
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

from nodeagent import files
from nodeagent.cgroups import paths as cgroup_paths
from nodeagent.cgroups.descriptors import WatchFds
from nodeagent.cgroups.manager import Cgroups
from nodeagent.cgroups.stats import CgroupStats, PressureStats
from nodeagent.config import Config
from nodeagent.errors import AlreadyExists, FailedPrecondition, NotFound
from nodeagent.images.catalog import Images
from nodeagent.images.holds import Holds
from nodeagent.lifecycle import recovery
from nodeagent.lifecycle.composition import Base, reach_launcher, recovered
from nodeagent.lifecycle.node import Node
from nodeagent.lifecycle.places import Places
from nodeagent.lifecycle.plan import etc_files
from nodeagent.lifecycle.plan.profiles import Profiles
from nodeagent.lifecycle.pods import sandboxes
from nodeagent.lifecycle.supervisors.launchers import Launchers
from nodeagent.net import bridge, listeners, network, setup, sysctls
from nodeagent.net.network import Network
from nodeagent.net.setup import NodeSide
from nodeagent.records import Image, ImageConfig
from nodeagent.sandbox import exits, paths
from nodeagent.sandbox.agent.channel import Channel
from nodeagent.store import Store
from nodeagent.tasks import Tasks
from nodeagent.trash import Trash
from tests.chaos.simulation.loop import Killed, Life
from tests.chaos.simulation.machine import Connection, Machine
from tests.chaos.simulation.processes import KILLED, Container, Launcher

IMAGE = Image(
    id="sha256:1", config=ImageConfig(), manifest="sha256:2", layers=("layer",), size_bytes=1, pulled_at=1
)  # fmt: skip
INSTANCE = "00000000"
_NOT_THERE: Any = None
machine: Machine = _NOT_THERE  # the one of the present run, for what is patched
_OS_CLOSE = os.close


class SimulatedStore(Store):
    """A store in memory; each write is two steps."""

    def _write(self, statement: str, parameters: tuple[object, ...] = ()) -> None:
        machine.step("store", statement[:40])
        super()._write(statement, parameters)
        machine.step("wrote")


class Group:
    """A cgroup, which outlives the agent."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.members: dict[Container, None] = {}


class Handle:
    """A cgroup as the agent has it: `nodeagent.cgroups.group.Cgroup`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._left: list[Handle] = []

    def _group(self) -> Group:
        group = machine.groups.get(self.path)
        if group is None:
            raise NotFound(f'cgroup "{self.path}": does not exist')
        return cast(Group, group)

    def exists(self) -> bool:
        return self.path in machine.groups

    def make(self) -> None:
        machine.step("cgroups.make", self.path)
        if self.path in machine.groups:
            raise AlreadyExists(f'cgroup "{self.path}": exists already')
        machine.groups[self.path] = Group(self.path)
        machine.step("made")

    def apply(self, _resources: object) -> None:
        machine.step("cgroups.apply", self.path)
        self._group()

    def set_devices(self, _rules: object) -> None:
        machine.step("cgroups.devices", self.path)
        self._group()

    def delegate(self, _uid: int) -> None:
        self._group()

    def join_fds(self) -> list[int]:
        machine.step("cgroups.join", self.path)
        return [machine.new_fd(self._group())]

    def watch_fds(self) -> WatchFds:
        return WatchFds(oom=None, procs=cast(Any, None), kill=None)

    def processes(self) -> list[int]:
        return [member.pid for member in self._group().members]

    def kill(self) -> None:
        machine.step("cgroups.kill", self.path)
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
        self._left += [Handle(path) for path in machine.groups if path.startswith(f"{self.path}/")]

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
        machine.step("cgroups.end", self.path)
        below = [p for p in machine.groups if p == self.path or p.startswith(f"{self.path}/")]
        members = [member for path in below for member in machine.groups[path].members]
        for member in members:
            if member.hangs_until > machine.loop.time():
                member.kill()
                raise FailedPrecondition(f'cgroup "{self.path}": has processes')
        for member in members:
            member.end(KILLED)
        for path in below:
            del machine.groups[path]
        machine.step("ended")


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


class SimulatedImages:
    """`nodeagent.images.catalog.Images`, of one image; its holds are the real ones."""

    def __init__(self, store: Store) -> None:
        self.holds = Holds(store)

    def find(self, name: str) -> Image | None:
        return IMAGE if name == "image" else None

    def list(self) -> Sequence[Image]:
        return [IMAGE]

    def lower_dirs(self, _image: Image) -> tuple[Path, ...]:
        return (Path("/layer"),)

    def hold(self, _image_id: str, holder: str) -> None:
        self.holds.add(IMAGE, holder)

    def release(self, holder: str) -> None:
        self.holds.remove(holder)

    @property
    def holders(self) -> set[str]:
        return self.holds.holders

    def release_others(self, holders: Collection[str]) -> None:
        for holder in sorted({hold.holder for hold in self.holds} - set(holders)):
            self.release(holder)


# --- the kernel's side of the network ---


class Links:
    """`nodeagent.net.links`."""

    @staticmethod
    def connect(lease: Any, _side: Any, _netns: int, _route: Any, *, is_new: bool) -> None:
        machine.step("network.connect", lease.link)
        if lease.link in machine.links and is_new:
            raise FileExistsError(errno.EEXIST, "File exists", lease.link)
        machine.links[lease.link] = lease.pod_id
        machine.addresses[lease.link] = lease.addresses
        machine.step("connected")

    @staticmethod
    def plug_in(_names: Any, _side: Any) -> None:
        machine.step("network.plug_in")

    @staticmethod
    def delete(name: str) -> None:
        machine.step("network.delete", name)
        machine.links.pop(name, None)
        machine.addresses.pop(name, None)

    @staticmethod
    def exists(name: str) -> bool:
        machine.drop_links()
        return name in machine.links

    @staticmethod
    def names(_prefix: str) -> Any:
        machine.drop_links()
        return _Sorted(machine.links)


class _Sorted(set[str]):
    """A set of names that is read in one order."""

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(set.__iter__(self)))

    def difference(self, *others: Any) -> Any:
        return _Sorted(set.difference(self, *others))

    def __and__(self, other: Any) -> Any:
        return _Sorted(set.__and__(self, other))


class SimulatedTable:
    """`nodeagent.net.declared.DeclaredTable`."""

    def __init__(self, name: str, elements: Callable[[], Sequence[Any]]) -> None:
        self._name = name
        self._elements = elements

    @classmethod
    def open(cls, declaration: Any, elements: Callable[[], Sequence[Any]]) -> "SimulatedTable":
        table = cls(type(declaration).__name__, elements)
        table.declare()
        return table

    def close(self) -> None:
        """Nothing is open."""

    def declare(self, _declaration: Any = None) -> None:
        machine.step("network.declare")
        machine.tables[self._name] = set(self._elements())

    def repair(self) -> None:
        """Nobody else changes it."""

    def add(self, elements: Sequence[Any]) -> None:
        machine.step("network.add")
        machine.tables[self._name].update(elements)

    def remove(self, elements: Sequence[Any]) -> None:
        machine.step("network.remove")
        machine.tables[self._name].difference_update(elements)

    def delete(self) -> None:
        machine.step("network.drop")
        machine.tables.pop(self._name, None)


async def _set_up(plan: Any) -> NodeSide:
    machine.step("network.set_up")
    machine.bridge = True
    subnets = tuple(ip_network(cidr) for cidr in (plan.config.subnet4,))
    return NodeSide(bridge="br", index=1, mtu=1500, subnets=subnets, settings={})


async def _tear_down(_plan: Any) -> None:
    machine.step("network.tear_down")
    machine.bridge = False


class Connector:
    """The way to the simulated processes; the channels are real ones."""

    async def connect(
        self, path: str, name: str, on_event: Callable[[Any], None], on_end: Callable[[], None]
    ) -> Channel:
        machine.step("connect", path)
        await asyncio.sleep(machine.loop.soon())
        process = machine.listeners.get(path)
        if process is None:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused", path)
        connection = Connection(machine, process)
        try:
            channel = Channel(cast(Any, connection), name, on_event, on_end)
        except BaseException:
            connection.close()
            raise
        process.accepted(connection)
        return channel

    async def start_launcher(self, state: str, _python: str, _join: Sequence[int]) -> None:
        machine.step("start_launcher")
        await asyncio.sleep(machine.loop.soon())
        if machine.launcher is not None:
            raise AlreadyExists(f"{state}: has a launcher")
        Launcher(machine, state)
        await asyncio.sleep(machine.loop.soon())


# --- what is patched for the whole process ---


def _stepped(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def step(path: Any, *args: Any, **options: Any) -> Any:
        machine.step(what, str(path))
        result = function(path, *args, **options)
        machine.step("filed")
        return result

    return step


def _listed(path: Path) -> Iterator[Path]:
    return iter(sorted(Path(path / name) for name in os.listdir(path)))


def _tree_removal(remove_tree: Callable[[str], None]) -> Callable[[str], None]:
    def remove(path: str) -> None:
        machine.remove_pod_files(path)
        remove_tree(path)

    return remove


def _record_of(pod: str, container: str) -> Any:
    machine.step("files.exit")
    return machine.exits.get((pod, container))


def _waitid(kind: int, fd: int, flags: int) -> Any:
    raise ChildProcessError(errno.ECHILD, "No child processes")


@contextmanager
def patched() -> Iterator[None]:
    """The boundaries of the agent's code are the machine's."""
    links = SimpleNamespace(
        connect=Links.connect, plug_in=Links.plug_in, delete=Links.delete, exists=Links.exists, names=Links.names
    )  # fmt: skip
    with ExitStack() as stack:
        enter = stack.enter_context
        # What a dead agent has begun is let go as it is.
        enter(warnings.catch_warnings())
        warnings.simplefilter("ignore", RuntimeWarning)
        enter(patch.object(sys, "unraisablehook", _unraisable))
        enter(patch.object(time, "time_ns", _time_ns))
        enter(patch.object(secrets, "token_hex", lambda count=32: machine.token(count)))
        enter(patch.object(secrets, "randbelow", _randbelow))
        enter(patch.object(os, "pidfd_open", lambda pid, flags=0: machine.pidfd_open(pid)))
        enter(patch.object(os, "waitid", _waitid))
        enter(patch.object(signal, "pidfd_send_signal", _pidfd_send_signal))
        enter(patch.object(Path, "mkdir", _stepped("files.mkdir", Path.mkdir)))
        enter(patch.object(Path, "rename", _stepped("files.rename", Path.rename)))
        enter(patch.object(Path, "iterdir", _listed))
        enter(patch.object(etc_files, "write", _stepped("files.write", etc_files.write)))
        for name in ("remove_tree", "ensure_directory"):
            enter(patch.object(files, name, _stepped(f"files.{name}", getattr(files, name))))
        enter(patch.object(files, "remove_tree", _tree_removal(files.remove_tree)))
        enter(patch.object(exits, "read", _record_of))
        enter(patch.object(paths, "unpin", _unpin))
        for module in (sandboxes, recovery):
            enter(patch.object(module, "boot_id", lambda: machine.boot))
        enter(patch.object(network, "links", links))
        enter(patch.object(network, "DeclaredTable", SimulatedTable))
        enter(patch.object(setup, "set_up", _set_up))
        enter(patch.object(setup, "tear_down", _tear_down))
        enter(patch.object(sysctls, "apply", lambda _settings: machine.step("network.sysctl")))
        enter(patch.object(bridge, "is_up", lambda _name: machine.bridge))
        enter(patch.object(listeners, "warnings", lambda *_: ()))
        yield


def _time_ns() -> int:
    return machine.time_ns()


def _randbelow(bound: int) -> int:
    return machine.random.randrange(bound)


def _pidfd_send_signal(fd: int, number: int, *_: Any) -> None:
    machine.pidfd_send_signal(fd, number)


def _unraisable(unraisable: Any) -> None:
    """Coroutines of a dead agent are destroyed in the middle of what they do."""
    if not isinstance(unraisable.exc_value, Killed | RuntimeError):
        sys.__unraisablehook__(unraisable)


def _unpin(pod: str) -> None:
    machine.step("unpin", pod)
    pod_id = os.path.basename(pod)
    if pod_id in machine.pods:
        machine.pods.pop(pod_id).has_pins = False


# --- one life of the agent ---


class Agent:
    """An agent's process: it starts, serves calls, and ends or is killed."""

    def __init__(
        self, number: int, root: Path, database: sqlite3.Connection, config: Config
    ) -> None:
        self.life = Life(number)
        self.node: Node | None = None
        self.base: Base | None = None
        self.stop = asyncio.Event()
        self.is_serving = False
        self.began_ns = 0
        self.calls: Tasks | None = None
        self.config = config
        self.places = Places(
            instance=INSTANCE, root=root / "root", state=root / "state", home=root / "state"
        )
        self._database = database

    async def run(self) -> None:
        """Serve until `stop`. Raises what keeps it from starting."""
        async with AsyncExitStack() as stack:
            self.base = await self._open(stack)
            self.node = await stack.enter_async_context(recovered(self.base))
            self.calls = self.base.tasks.part()
            self.is_serving = True
            machine.trace("agent serves")
            await self.stop.wait()
            machine.trace("agent stops")
            self.is_serving = False
            await asyncio.sleep(machine.loop.soon())
            await self.calls.settled(5.0)
            await self.calls.close()

    async def _open(self, stack: AsyncExitStack) -> Base:
        for directory in (
            self.places.root,
            self.places.containers,
            self.places.trash,
            self.places.pods,
        ):
            directory.mkdir(parents=True, exist_ok=True)
        tasks = await stack.enter_async_context(Tasks(clock=asyncio.get_running_loop().time))
        if self._database.in_transaction:
            self._database.execute("ROLLBACK")
        store = SimulatedStore(self._database)
        cgroups = cast(Cgroups, SimulatedCgroups())
        net = await Network.start(
            config=self.config.network, store=store, instance=INSTANCE, tasks=tasks
        )
        trash = Trash(self.places.trash, "trash", tasks)
        stack.push_async_callback(trash.close)
        connector = Connector()
        launchers = Launchers(partial(reach_launcher, cgroups, self.places, connector), tasks)
        artifacts: Any = None
        images = cast(Images, SimulatedImages(store))
        profiles = Profiles("")
        return Base(
            self.config, self.places, profiles, tasks, store, images, artifacts, cgroups, net, trash, launchers,
            connector,
        )  # fmt: skip
