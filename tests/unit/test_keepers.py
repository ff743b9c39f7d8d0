"""Each background task of the agent, when its work fails once, and when it always fails.

After the first failure the work goes on. A task that always fails is named by the log and by its count, and holds up
nobody's end. The tasks of the network, which need one, are in tests/kernel/net/test_keepers.py.
"""

import asyncio
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nodeagent import files, trash
from nodeagent.cri import reachability
from nodeagent.errors import Unavailable
from nodeagent.lifecycle import health as health_module
from nodeagent.lifecycle import sessions as sessions_module
from nodeagent.lifecycle.containers.removal import Removal
from nodeagent.lifecycle.events import Events
from nodeagent.lifecycle.health import Health
from nodeagent.lifecycle.inventory import Inventory, Pod
from nodeagent.lifecycle.pods.slots import Slots
from nodeagent.lifecycle.reconcile import Reconciliation
from nodeagent.lifecycle.sessions import Sessions
from nodeagent.lifecycle.supervisors import polling
from nodeagent.lifecycle.supervisors.launchers import Launchers
from nodeagent.lifecycle.supervisors.polling import Polling
from nodeagent.lifecycle.supervisors.supervision import Supervision
from nodeagent.lifecycle.usage import disk
from nodeagent.lifecycle.usage.disk import Disks
from nodeagent.sandbox.agent.client import Launcher, Supervisor
from nodeagent.serving import listener, service_manager
from nodeagent.serving.listener import Listener, Place
from nodeagent.store import Store
from nodeagent.streaming.server import StreamingServer
from nodeagent.streaming.session import Timeouts
from nodeagent.streaming.tls import TLSFiles
from nodeagent.tasks import Tasks, cancel
from nodeagent.trash import Trash
from tests.support.faults import Fault, any_error, impatient_tasks, until
from tests.unit.cri import records
from tests.unit.test_operations_doc import tasks

pytestmark = pytest.mark.filterwarnings("error")


@dataclass
class World:
    """What a task is made of: its owner, what may fail, and a place."""

    tasks: Tasks
    fault: Fault
    folder: Path
    patch: pytest.MonkeyPatch
    stack: AsyncExitStack


@dataclass
class Work:
    """ask: for work, which may be asked for again. is_done: whether some was done since then."""

    task: str
    ask: Callable[[], Awaitable[object]]
    is_done: Callable[[], object]
    close: Callable[[], Awaitable[object]]


class FakeSupervisor:
    is_lost = False
    silent = ""
    on_exit: Any = None
    on_init_exit: Any = None

    def __init__(self, fault: Fault | None = None) -> None:
        self.lost, self.ended = asyncio.Event(), asyncio.Event()
        self.states = 0
        self._fault = fault

    async def has_died(self) -> bool:
        return True

    def close(self) -> None:
        """It has no connection."""

    async def shutdown(self) -> None:
        """Nothing runs in it."""

    async def state(self) -> list[Any]:
        if self._fault is not None:
            self._fault.strike()
        self.states += 1
        return []


# --- the tasks ---


async def removing_files(world: World) -> Work:
    world.patch.setattr(files, "remove_tree", world.fault.before(files.remove_tree))
    world.patch.setattr(trash, "RETRY_SECONDS", 0)
    bin_ = Trash(world.folder / "trash", "trash", world.tasks)

    async def ask() -> None:
        for name in ("first", "second"):
            (world.folder / name).mkdir()
            bin_.take(world.folder / name)

    return Work("trash", ask, lambda: not list(bin_.directory.iterdir()), bin_.close)


async def filling_slots(world: World) -> Work:
    handles = SimpleNamespace(net=-1, route=None)

    async def namespaces() -> Any:
        return cast(Any, _Handles(handles.net))

    def supervisor() -> Any:
        made: Any = FakeSupervisor()
        made.namespaces = namespaces
        return made

    async def fork(_: object) -> Any:
        return supervisor()

    async def get() -> Any:
        return SimpleNamespace(fork=fork)

    async def attach(*_: object) -> Any:
        world.fault.strike()
        return SimpleNamespace(addresses=())

    async def detach(_: str) -> None:
        """There is no network."""

    network: Any = SimpleNamespace(attach=attach, detach=detach, hands_out=lambda _: True)
    launchers: Any = SimpleNamespace(get=get)
    slots = Slots(launchers, network, world.folder, 2, world.tasks)

    async def ask() -> None:
        slots.start()

    async def close() -> None:
        await slots.close()
        assert list(world.folder.iterdir()) == []

    return Work("warm slots", ask, lambda: slots.ready == 2, close)


class _Handles(ExitStack):
    def __init__(self, net: int) -> None:
        super().__init__()
        self.net, self.route = net, None


async def replacing_launchers(world: World) -> Work:
    made: list[Any] = []

    async def start() -> Launcher:
        made.append(SimpleNamespace(ended=asyncio.Event(), close=lambda: None))
        return cast(Launcher, made[-1])

    launchers = Launchers(world.fault.before_async(start), world.tasks)

    async def ask() -> None:
        launchers.start()

    return Work("launcher", ask, lambda: made and not launchers.trouble, launchers.close)


def supervision(world: World, launchers: Any) -> tuple[Inventory, Supervision]:
    store = world.stack.enter_context(closing(Store.open(world.folder / "state.db")))
    inventory = Inventory(store, Events())
    return inventory, Supervision(inventory, launchers, world.folder, world.tasks)


def succession(world: World, successor: FakeSupervisor, get_fault: Fault | None) -> Work:
    async def successor_of(*_: object) -> Any:
        return successor

    async def get() -> Any:
        if get_fault is not None:
            get_fault.strike()
        return SimpleNamespace(successor=successor_of)

    inventory, watching = supervision(world, SimpleNamespace(get=get))
    first = cast(Supervisor, FakeSupervisor())
    inventory.pods["pod"] = Pod(first)
    watching.watch("pod", first)

    async def ask() -> None:
        first.ended.set()

    def is_done() -> bool:
        return inventory.pods["pod"].supervisor is cast(Any, successor) and successor.states > 0

    return Work("succession", ask, is_done, watching.close)


async def replacing_supervisors(world: World) -> Work:
    return succession(world, FakeSupervisor(), world.fault)


async def asking_successors(world: World) -> Work:
    return succession(world, FakeSupervisor(world.fault), None)


async def recovering_pods(world: World) -> Work:
    """What an earlier agent has left: the supervisor of a pod that is taken over cannot be asked at first."""
    _, watching = supervision(world, None)
    found = FakeSupervisor(world.fault)

    async def connect(*_: object) -> Any:
        return found

    world.patch.setattr(Supervisor, "connect", connect)

    async def ask() -> None:
        watching.expect("pod")
        watching.recover("pod", partial(watching.adopt, "pod"))

    return Work("recovery", ask, lambda: found.states, watching.close)


async def undoing_creations(world: World) -> Work:
    inventory, _ = supervision(world, None)
    container = records.container("c", sandbox_id="pod", created_at=0)
    inventory.save(container)

    async def remove(_: object) -> None:
        world.fault.strike()

    async def nothing(_: object) -> None: ...

    groups: Any = SimpleNamespace(remove=remove)
    images: Any = SimpleNamespace(release=nothing)
    directories: Any = SimpleNamespace(take=nothing)
    removal = Removal(inventory, groups, images, directories, world.tasks)
    asking: list[asyncio.Task[None]] = []

    async def ask() -> None:
        asking.append(asyncio.create_task(removal.undo(container)))

    async def close() -> None:
        await removal.close()
        await asyncio.wait(asking)

    return Work("undo", ask, lambda: not inventory.containers, close)


async def feeding_the_watchdog(world: World) -> Work:
    fed: list[str] = []
    world.patch.setattr(service_manager, "notify", world.fault.before(fed.append))
    asked = asyncio.Event()

    async def feed() -> None:
        await asked.wait()
        await service_manager.feed_watchdog(0)

    world.tasks.keep(service_manager.WATCHDOG, feed)

    async def ask() -> None:
        asked.set()

    return Work("watchdog", ask, lambda: fed, world.tasks.close)


async def reconciling(world: World) -> Work:
    inventory, _ = supervision(world, None)
    looks: list[Any] = []

    async def get() -> Any:
        raise Unavailable("there is no launcher")

    def is_recovering(_: str) -> bool:
        return False

    class Network:
        @property
        def holders(self) -> set[str]:
            world.fault.strike()
            looks.append(self)
            return set()

        async def strays(self) -> set[str]:
            return set()

    folder = world.folder
    places = SimpleNamespace(pods=folder, containers=folder, trash=folder, staging=folder)
    nothing: Any = None
    images: Any = SimpleNamespace(holders=set())
    parts: Any = {"launchers": SimpleNamespace(get=get), "slots": SimpleNamespace(ids=set())}
    parts |= {"network": Network(), "images": images, "places": places}
    parts["cgroups"] = SimpleNamespace(of_pods_without_parent=dict)
    made = Reconciliation(
        inventory=inventory, creation=nothing, containers=nothing, tasks=world.tasks, **parts
    )
    made.is_recovering = is_recovering

    async def ask() -> None:
        made.start()

    return Work("reconciliation", ask, lambda: looks, made.close)


async def asking_for_states(world: World) -> Work:
    inventory, watching = supervision(world, None)
    inventory.save(records.container("c", sandbox_id="pod", started_at=1))
    supervisor = FakeSupervisor(world.fault)
    inventory.pods["pod"] = Pod(cast(Supervisor, supervisor))
    watching.watch("pod", cast(Supervisor, supervisor))
    world.patch.setattr(polling, "PERIOD_SECONDS", 0)
    asking = Polling(inventory, watching, world.tasks)

    async def kill(_: object) -> None:
        """Nothing runs."""

    async def ask() -> None:
        watching.kill = kill
        asking.start()

    async def close() -> None:
        await asking.close()
        await watching.close()

    return Work("supervisor state", ask, lambda: supervisor.states, close)


async def ending_pods(world: World) -> Work:
    inventory, watching = supervision(world, None)
    supervisor = cast(Supervisor, FakeSupervisor())
    inventory.pods["pod"] = Pod(supervisor)
    watching.watch("pod", supervisor)
    ended: list[str] = []

    async def end_pod(sandbox_id: str) -> None:
        world.fault.strike()
        ended.append(sandbox_id)

    watching.end_pod = end_pod

    async def ask() -> None:
        supervisor.on_init_exit()

    return Work("pod end", ask, lambda: ended, watching.close)


async def clearing_up_execs(world: World) -> Work:
    gone: list[object] = []

    async def wait() -> None:
        """The command has ended."""

    handle: Any = SimpleNamespace(wait=wait)
    whole: Any = SimpleNamespace(discard=world.fault.before(gone.append))
    nothing = cast(Any, None)
    sessions = Sessions(nothing, nothing, nothing, nothing, world.tasks)

    async def ask() -> None:
        sessions.do_behind("exec cleanup", sessions_module._remove_after(handle, whole, nothing))

    return Work("exec cleanup", ask, lambda: gone, sessions.close)


async def measuring_disks(world: World) -> Work:
    (world.folder / "id/upper").mkdir(parents=True)
    world.patch.setattr(disk, "DISK_SECONDS", 0)
    world.patch.setattr(disk, "measure", world.fault.before(disk.measure))
    disks = Disks(world.folder, world.tasks)
    found: list[int | None] = []

    async def ask() -> None:
        found.append((await disks.usage("id")).used_bytes)

    return Work("disk usage", ask, lambda: found[-1] is not None, world.tasks.close)


async def looking_at_health(world: World) -> Work:
    looks: list[Path] = []

    def identity(path: Path) -> tuple[int, int]:
        looks.append(path)
        return (0, 0)

    world.patch.setattr(health_module, "_identity", identity)
    places = SimpleNamespace(root=world.folder, pods=world.folder)
    well = SimpleNamespace(trouble=str, covered=str)
    looked: Any = (places, well, SimpleNamespace(trouble=""), well, world.tasks)
    health = Health(*looked)
    world.patch.setattr(health._paths, "look_up", world.fault.before_async(health._paths.look_up))
    before = len(looks)

    async def ask() -> None:
        assert await health.trouble() == health_module.NONE

    return Work("health", ask, lambda: len(looks) > before, world.tasks.close)


async def accepting_connections(world: World) -> Work:
    served: list[Place] = []

    async def serve(connection: Any, place: Place) -> None:
        served.append(place)
        connection.close()

    listening = listener.bind("127.0.0.1", 0)
    server = Listener(listening, serve, name="server", places=3, head_s=1000, tasks=world.tasks)
    world.patch.setattr(server, "_make_room", world.fault.before_async(server._make_room))
    address = listening.getsockname()
    opened = AsyncExitStack()
    await opened.enter_async_context(server.open())

    async def ask() -> None:
        _, writer = await asyncio.open_connection(*address)
        writer.transport.abort()

    return Work("server", ask, lambda: served, opened.aclose)


async def following_tls_files(world: World) -> Work:
    class Files:
        def __init__(self) -> None:
            self.fault: Fault | None = None
            self.loaded = 0

        def version(self) -> int:
            if self.fault is not None:
                self.fault.strike()
            return self.loaded

        def load(self) -> ssl.SSLContext:
            self.loaded += 1
            return ssl.create_default_context()

    tls = Files()
    server = StreamingServer(
        cast(Any, None), world.tasks, tls=cast(TLSFiles, tls), timeouts=Timeouts(tls_check_s=0.001)
    )
    await server.__aenter__()

    async def ask() -> None:
        tls.fault = world.fault

    return Work("streaming TLS files", ask, lambda: tls.loaded > 1, server.__aexit__)


async def staying_reachable(world: World) -> Work:
    made: list[str] = []

    async def serve_anew() -> None:
        made.append("anew")

    world.patch.setattr(reachability, "LOOK_SECONDS", 0.001)
    world.patch.setattr(reachability, "answers", world.fault.before(lambda _path: False))
    keeping = world.tasks.keep(
        "CRI socket", partial(reachability.keep, [world.folder / "s"], serve_anew)
    )

    async def ask() -> None:
        made.clear()

    return Work("CRI socket", ask, lambda: made, partial(cancel, keeping))


TASKS = [
    staying_reachable,
    removing_files,
    filling_slots,
    replacing_launchers,
    replacing_supervisors,
    asking_successors,
    recovering_pods,
    asking_for_states,
    undoing_creations,
    reconciling,
    feeding_the_watchdog,
    ending_pods,
    clearing_up_execs,
    measuring_disks,
    looking_at_health,
    accepting_connections,
    following_tls_files,
]
each_task = pytest.mark.parametrize("make", TASKS, ids=lambda make: make.__name__)
# These are done when somebody asks for them, and once each time.
ON_REQUEST = (clearing_up_execs, measuring_disks, looking_at_health, accepting_connections)


# Those of tests/kernel/net/test_keepers.py, and work that is done once, for a client that hears of its failure.
ELSEWHERE = {"network leases", "network bridge", "host ports"}
ONCE = {"resize", "streaming session"}
# Of a class that is here under another name.
ALIKE = {"staging", "streaming server", "metrics server", "control socket"}


def test_no_task_is_left_out() -> None:
    here = set(re.findall(r'Work\("([^"]+)"', Path(__file__).read_text()))
    assert set(tasks()) - here == ELSEWHERE | ONCE | ALIKE


# --- what holds for each ---


@pytest.fixture
async def world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception]
) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        yield World(impatient_tasks(), Fault(error), tmp_path, monkeypatch, stack)


async def asked(
    make: Callable[[World], Awaitable[Work]], work: Work, failed: Callable[[], bool]
) -> None:
    """Ask for work until it has failed so often."""
    await work.ask()
    while not failed():
        if make in ON_REQUEST:
            await work.ask()
        await asyncio.sleep(0.001)


@any_error
@each_task
async def test_work_goes_on_after_a_failure(
    world: World, make: Callable[[World], Awaitable[Work]]
) -> None:
    work = await make(world)
    world.fault.once()
    await asked(make, work, lambda: count(world, work) == 1)
    if make in ON_REQUEST:
        await work.ask()
    await until(work.is_done)
    await ended(world, work)
    assert count(world, work) == 1


@any_error
@each_task
async def test_work_that_always_fails_is_named_and_holds_up_no_end(
    world: World,
    make: Callable[[World], Awaitable[Work]],
    error: Callable[[], Exception],
    caplog: pytest.LogCaptureFixture,
) -> None:
    work = await make(world)
    world.fault.for_ever()
    await asked(make, work, lambda: count(world, work) >= 3)
    await ended(world, work)
    named = [record for record in caplog.records if f"{work.task}: " in record.getMessage()]
    assert named
    assert str(error()) in named[0].getMessage()
    assert named[0].exc_info is not None
    assert str(error()) in world.tasks.failures.by_name[work.task].last_error


def count(world: World, work: Work) -> int:
    failure = world.tasks.failures.by_name.get(work.task)
    return failure.count if failure else 0


async def ended(world: World, work: Work) -> None:
    """The part that has the task ends, then its owner; nothing is left."""
    before = asyncio.all_tasks()
    await work.close()
    await world.tasks.close()
    assert asyncio.all_tasks() <= before
    assert asyncio.all_tasks() == {asyncio.current_task()}
