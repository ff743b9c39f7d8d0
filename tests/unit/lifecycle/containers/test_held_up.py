"""Whoever waits for a creation or a start that does not come to an end is told what holds it up."""

import asyncio
import os
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nodeagent.errors import FailedPrecondition, NotFound, Unavailable
from nodeagent.lifecycle.containers import containers as containers_module
from nodeagent.lifecycle.containers import creation as creation_module
from nodeagent.lifecycle.containers import held_up
from nodeagent.lifecycle.containers import stopping as stopping_module
from nodeagent.lifecycle.containers.containers import Containers
from nodeagent.lifecycle.containers.creation import Creation
from nodeagent.lifecycle.containers.groups import Groups
from nodeagent.lifecycle.containers.stopping import Stopping
from nodeagent.lifecycle.events import Events
from nodeagent.lifecycle.inventory import Inventory, Pod
from nodeagent.lifecycle.supervisors.supervision import Supervision
from nodeagent.requests import ContainerConfig, Resources
from nodeagent.store import Store
from nodeagent.tasks import Caller, Tasks, caller
from tests.support.faults import until
from tests.unit.cri import records

POD, CONTAINER = "a" * 64, "c" * 64
IMPATIENT_SECONDS, PATIENT_SECONDS = 0.01, 60.0
SILENT = 'process 7 does not answer: it is stopped (state T); resume it with "kill -CONT 7"'


class World:
    """A pod with a container that is created. `go`: lets the supervisor answer; `pids`: in the container's group."""

    def __init__(self, store: Store, folder: Path, tasks: Tasks, patience_s: float) -> None:
        self.silent, self.asked = "", 0
        self.go = asyncio.Event()
        self.pids: list[int] = []
        self.inventory = Inventory(store, Events())
        self.inventory.save(records.sandbox(POD))
        self.inventory.save(records.container(CONTAINER, sandbox_id=POD))
        self.inventory.pods[POD] = Pod(supervisor=self)  # type: ignore[arg-type]
        group = SimpleNamespace(
            processes=lambda: self.pids,
            kill=lambda: None,
            apply=lambda _limits: None,
            set_devices=lambda _rules: None,
        )
        known = SimpleNamespace(of=lambda _: group, create=lambda *_: group, limit_pod=lambda _: 0)
        self.groups = cast(Groups, known)
        nothing: Any = SimpleNamespace()
        self.supervision = Supervision(
            self.inventory, nothing, folder, tasks, patience_s=patience_s
        )
        self.stopping = Stopping(self.inventory, self.supervision, self.groups)
        self.containers = Containers(
            inventory=self.inventory,
            supervision=self.supervision,
            groups=self.groups,
            stopping=self.stopping,
            removal=nothing,
            directories=nothing,
            pods=folder,
        )
        self.creation = self._creation(folder, tasks, patience_s)

    def _creation(self, folder: Path, tasks: Tasks, patience_s: float) -> Creation:
        async def resolve(_config: object) -> Any:
            return SimpleNamespace(devices=SimpleNamespace(rules=()))

        async def make(_container_id: str) -> None:
            """There is nothing to be mounted."""

        planner: Any = SimpleNamespace(
            resolve=resolve, plan=lambda *_: {}, images=lambda *_: [], mount_statuses=lambda _: ()
        )
        images: Any = SimpleNamespace(find=lambda _: records.image())
        cgroups: Any = SimpleNamespace(container_path=lambda *names: "/".join(names))
        nothing: Any = SimpleNamespace()
        return Creation(
            inventory=self.inventory,
            images=images,
            cgroups=cgroups,
            groups=self.groups,
            planner=planner,
            cdi=SimpleNamespace(is_asked_for=lambda _: False),  # type: ignore[arg-type]
            removal=nothing,
            directories=SimpleNamespace(make=make, path=folder.joinpath),  # type: ignore[arg-type]
            tasks=tasks,
            patience_s=patience_s,
        )

    # as a supervisor

    def require(self) -> None:
        """It can be had."""

    async def agree(self) -> None:
        """It understands us."""

    async def start(self, _container_id: str) -> int:
        self.asked += 1
        await self.go.wait()
        return 5

    async def create(self, *_: object) -> Any:
        self.asked += 1
        await self.go.wait()
        identity = {"uid": 0, "gid": 0, "groups": []}
        return SimpleNamespace(pid=8, identity=identity, warnings=())

    async def stop(self, *_: object) -> None:
        """It sends the signal; the process does not end."""


@asynccontextmanager
async def opened(folder: Path, patience_s: float) -> AsyncIterator[World]:
    async with Tasks() as tasks:
        with closing(Store.open(folder / "state.db")) as store:
            yield World(store, folder, tasks, patience_s)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """Its callers wait for as long as it takes."""
    async with opened(tmp_path, PATIENT_SECONDS) as made:
        yield made


@pytest.fixture
async def impatient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """Its callers are soon told what they wait for."""

    def none(_group: object) -> Any:
        return closing(SimpleNamespace(close=lambda: None))

    monkeypatch.setattr(creation_module, "supervisor_files", none)
    async with opened(tmp_path, IMPATIENT_SECONDS) as made:
        yield made


@pytest.fixture
def stopped() -> Iterator[int]:
    """The pid of a process that stands still."""
    with subprocess.Popen(["sleep", "1000"]) as process:
        process.send_signal(signal.SIGSTOP)
        stat = Path(f"/proc/{process.pid}/stat")
        while ") T " not in stat.read_text():
            pass
        yield process.pid
        process.kill()


def config() -> ContainerConfig:
    return ContainerConfig(name="new", image="i", mounts=())


def state_of(world: World, container_id: str) -> str:
    return world.inventory.containers[container_id].state


async def test_a_start_that_hangs_names_the_process_that_stands_still_and_a_retry_joins(
    impatient: World, stopped: int
) -> None:
    impatient.pids = [stopped]
    for _ in range(2):
        with pytest.raises(TimeoutError) as raised:
            await impatient.containers.start(CONTAINER)
        assert str(raised.value) == (
            f'container "{CONTAINER}": not started within 0.01 s, it goes on, and a retry joins it: waiting for its '
            f"first process, which is to execute the program: process {stopped}: it is stopped (state T); resume it "
            f'with "kill -CONT {stopped}"'
        )
    impatient.go.set()
    await until(lambda: state_of(impatient, CONTAINER) == "running")
    await impatient.containers.start(CONTAINER)
    assert impatient.asked == 1
    with pytest.raises(FailedPrecondition, match="is running, not created"):
        await impatient.containers.start(CONTAINER)


async def test_a_start_that_hangs_names_a_supervisor_that_does_not_answer(impatient: World) -> None:
    impatient.silent = SILENT
    with pytest.raises(TimeoutError, match=re.escape(f"execute the program: {SILENT}")):
        await impatient.containers.start(CONTAINER)


async def test_a_creation_that_hangs_names_what_does_not_go_on_and_a_retry_joins(
    impatient: World, stopped: int
) -> None:
    stage = "which mounts its root filesystem: "
    impatient.pids = [stopped]
    with pytest.raises(TimeoutError, match=f"{stage}process {stopped}: it is stopped"):
        await impatient.creation.create(POD, config())
    impatient.silent = SILENT
    with pytest.raises(TimeoutError, match=re.escape(stage + SILENT)):
        await impatient.creation.create(POD, config())
    impatient.go.set()
    await until(lambda: len(impatient.inventory.visible_containers()) == 2)
    made = await impatient.creation.create(POD, config())
    assert impatient.asked == 1
    assert state_of(impatient, made) == "created"


async def start_for_a_caller_who_goes(world: World) -> None:
    """He goes before the program runs."""
    gone = Caller()
    caller.set(gone)
    starting = asyncio.create_task(world.containers.start(CONTAINER))
    await until(lambda: world.asked == 1)
    gone.has_gone = True
    world.go.set()
    await starting
    caller.set(Caller())


async def test_a_start_that_succeeds_when_its_caller_has_gone_is_told_to_the_retry(
    world: World,
) -> None:
    await start_for_a_caller_who_goes(world)
    await world.containers.start(CONTAINER)
    assert world.asked == 1


async def test_what_has_ended_since_is_not_told_as_started(world: World) -> None:
    await start_for_a_caller_who_goes(world)
    world.supervision._exited(CONTAINER, {"code": 7, "at": 9, "oom": False})
    with pytest.raises(FailedPrecondition, match="is exited, not created"):
        await world.containers.start(CONTAINER)


async def test_neither_a_stop_nor_an_update_waits_as_long_as_a_start(
    world: World, stopped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping_module, "START_SECONDS", 0)
    monkeypatch.setattr(stopping_module, "KILL_PATIENCE_SECONDS", 0)
    monkeypatch.setattr(containers_module, "LOCK_SECONDS", 0)
    starting = asyncio.create_task(world.containers.start(CONTAINER))
    await until(lambda: world.asked == 1)
    world.silent = SILENT
    with pytest.raises(TimeoutError, match=re.escape(SILENT)):
        await world.stopping.stop(CONTAINER, 30)
    with pytest.raises(Unavailable, match="is being started"):
        await world.containers.update(CONTAINER, Resources())
    world.go.set()
    await starting


def test_what_holds_nothing_up_is_not_named() -> None:
    def gone() -> list[int]:
        raise NotFound("cgroup: is gone")

    supervisor: Any = SimpleNamespace(silent="")
    runs: Any = SimpleNamespace(processes=lambda: [os.getpid(), 1 << 22])
    assert held_up.why(supervisor, runs) == ""
    removed: Any = SimpleNamespace(processes=gone)
    assert held_up.why(supervisor, removed) == ""
