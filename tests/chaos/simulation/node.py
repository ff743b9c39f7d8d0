"""The agent on the simulated machine: the real composition, on parts whose kernel is the machine."""

import asyncio
import errno
import sqlite3
from collections.abc import Callable, Collection, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, cast

from nodeagent.cgroups.manager import Cgroups
from nodeagent.config import Config
from nodeagent.database import Change, Database
from nodeagent.errors import AlreadyExists
from nodeagent.images.catalog import Images
from nodeagent.images.holds import Holds
from nodeagent.lifecycle.composition import Base, reach_launcher, recovered
from nodeagent.lifecycle.node import Node
from nodeagent.lifecycle.places import Places
from nodeagent.lifecycle.plan.profiles import Profiles
from nodeagent.lifecycle.supervisors.launchers import Launchers
from nodeagent.net.network import Network
from nodeagent.records import Image, ImageConfig
from nodeagent.sandbox.agent.channel import Channel
from nodeagent.store import Store
from nodeagent.tasks import Tasks
from nodeagent.trash import Trash
from tests.chaos.simulation import world
from tests.chaos.simulation.cgroups import INSTANCE, SimulatedCgroups
from tests.chaos.simulation.connection import Connection
from tests.chaos.simulation.launcher import Launcher
from tests.chaos.simulation.loop import Life

IMAGE = Image(
    id="sha256:1", config=ImageConfig(), manifest="sha256:2", layers=("layer",), size_bytes=1, pulled_at=1
)  # fmt: skip


class SimulatedRows(Database):
    """Rows in memory; each write is two steps."""

    def write(self, changes: Sequence[Change]) -> None:
        keys = {change.key for change in changes}
        world.machine.unwritten |= keys
        world.machine.step("store", changes[0].table)
        super().write(changes)
        world.machine.unwritten -= keys
        world.machine.step("wrote")


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

    async def release(self, holder: str) -> None:
        self.holds.remove(holder)

    @property
    def holders(self) -> set[str]:
        return self.holds.holders

    async def release_others(self, holders: Collection[str]) -> None:
        for holder in sorted({hold.holder for hold in self.holds} - set(holders)):
            await self.release(holder)


class Connector:
    """The way to the simulated processes; the channels are real ones."""

    async def connect(
        self, path: str, name: str, on_event: Callable[[Any], None], on_end: Callable[[], None]
    ) -> Channel:
        world.machine.step("connect", path)
        await asyncio.sleep(world.machine.loop.soon())
        process = world.machine.listeners.get(path)
        if process is None:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused", path)
        connection = Connection(world.machine, process)
        try:
            channel = Channel(cast(Any, connection), name, on_event, on_end)
        except BaseException:
            connection.close()
            raise
        process.accepted(connection)
        return channel

    async def start_launcher(self, state: str, _python: str, _join: Sequence[int]) -> None:
        world.machine.step("start_launcher")
        await asyncio.sleep(world.machine.loop.soon())
        if world.machine.launcher is not None:
            raise AlreadyExists(f"{state}: has a launcher")
        Launcher(world.machine, state)
        await asyncio.sleep(world.machine.loop.soon())


class Agent:
    """An agent's process: it starts, serves calls, and ends or is killed."""

    def __init__(
        self, number: int, root: Path, database: sqlite3.Connection, config: Config
    ) -> None:
        self.life = Life(number)
        self.node: Node | None = None
        self.base: Base | None = None
        self.stop = asyncio.Event()
        self.on_serving: Callable[[Node], None] = lambda _: None  # before the first call
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
            self.on_serving(self.node)
            self.is_serving = True
            world.machine.trace("agent serves")
            await self.stop.wait()
            world.machine.trace("agent stops")
            self.is_serving = False
            await asyncio.sleep(world.machine.loop.soon())
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
        store = Store(SimulatedRows(self._database))
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
