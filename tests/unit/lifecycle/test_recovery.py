"""A pod without a record is removed once its supervisor was asked, however long it cannot be reached."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nodeagent.errors import AlreadyExists, NodeAgentError, Unavailable
from nodeagent.lifecycle.events import Events
from nodeagent.lifecycle.inventory import Inventory, boot_id
from nodeagent.lifecycle.pods import cgroup
from nodeagent.lifecycle.recovery import Recovery
from nodeagent.store import Store
from nodeagent.tasks import Tasks
from tests.unit.cri import records

POD, OTHER, READY, CONTAINER = "a" * 64, "b" * 64, "c" * 64, "d" * 64

MAY_PASS = {
    "no descriptor": OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
    "no buffer": OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS)),
    "no answer": TimeoutError("it does not answer"),
    "no launcher": Unavailable("launcher: died"),
}
FOR_GOOD = {
    "no files": FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)),
    "damaged files": NodeAgentError("pod.json: is damaged"),
}


class World:
    """A node. `errors`: of each attempt to reach a supervisor, by pod, the last one for good; `supervised`: by the
    launcher; `steps`: what was done; `shut_down`: the pods whose supervisors were asked to end; `groups`: ids by path.
    """

    def __init__(self, store: Store, folder: Path, tasks: Tasks) -> None:
        self.inventory = Inventory(store, Events())
        self.pods = folder / "pods"
        (folder / "containers").mkdir(parents=True)
        self.pods.mkdir()
        self.errors: dict[str, list[Exception | None]] = {}
        self.supervised: list[Exception | list[str]] = [[]]
        self.steps: list[str] = []
        self.shut_down: list[str] = []
        self.groups: dict[str, str] = {}
        self.tasks = tasks
        parts: Any = {
            "inventory": self.inventory,
            "supervision": SimpleNamespace(
                reach=self._reach, recover=self._recover, expect=self._expect, adopt=self._reach
            ),
            "containers": SimpleNamespace(),
            "stopping": SimpleNamespace(kill_all=self._step("kill")),
            "network": SimpleNamespace(detach=self._step("detach"), recover=self._step("recover")),
            "images": SimpleNamespace(release_others=self._step("release others")),
            "launchers": SimpleNamespace(get=self._launcher),
            "cgroups": SimpleNamespace(
                pod_path=lambda pod_id: f"/{pod_id}",
                of_pods_without_parent=lambda: dict(self.groups),
                end=self.groups.pop,
            ),
            "places": SimpleNamespace(pods=self.pods, containers=folder / "containers"),
        }
        self.recovery = Recovery(**parts)

    def _recover(self, what: str, work: Callable[[], Any]) -> asyncio.Task[None]:
        return self.tasks.keep("recovery", work, about=what, longest_pause_seconds=0.001)

    def _expect(self, pod_id: str) -> None:
        self.inventory.pods[pod_id] = SimpleNamespace()  # type: ignore[assignment]

    async def _reach(self, pod_id: str) -> Any:
        errors = self.errors.get(pod_id, [None])
        error = errors.pop(0) if len(errors) > 1 else errors[0]
        if error is not None:
            raise error

        async def shutdown() -> None:
            self.shut_down.append(pod_id)

        return SimpleNamespace(shutdown=shutdown)

    async def _launcher(self) -> Any:
        async def pods() -> list[str]:
            told = self.supervised.pop(0) if len(self.supervised) > 1 else self.supervised[0]
            if isinstance(told, Exception):
                raise told
            return told

        return SimpleNamespace(pods=pods, abandon=self._step("abandon"))

    def _step(self, name: str) -> Any:
        async def step(about: object) -> None:
            self.steps.append(f"{name} {about}"[: len(name) + 2])

        return step


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    async def remove(*_: object) -> None:
        """There is no group."""

    monkeypatch.setattr(cgroup, "remove_below", remove)
    async with Tasks() as tasks:
        with closing(Store.open(tmp_path / "state.db")) as store:
            yield World(store, tmp_path, tasks)


@pytest.mark.parametrize("error", MAY_PASS.values(), ids=MAY_PASS)
async def test_a_pod_that_cannot_be_reached_yet_is_left_as_it_is(
    world: World, error: Exception
) -> None:
    """Its supervisor may live, and is found by its socket only."""
    (world.pods / POD).mkdir()
    world.errors[POD] = [error]
    with pytest.raises(type(error)):
        await world.recovery.dismantle(world.pods / POD)
    assert (world.pods / POD).exists()
    assert world.steps == []


@pytest.mark.parametrize("error", FOR_GOOD.values(), ids=FOR_GOOD)
async def test_a_pod_that_can_have_no_supervisor_is_removed_without_one(
    world: World, error: Exception
) -> None:
    (world.pods / POD).mkdir()
    world.errors[POD] = [error]
    await world.recovery.dismantle(world.pods / POD)
    assert not (world.pods / POD).exists()
    assert world.steps == ["abandon a", "detach a"]


async def test_a_supervisor_that_cannot_be_reached_is_killed_by_the_launcher_that_knows_it(
    world: World,
) -> None:
    """While it does not, the pod is left as it is: a supervisor goes to each new launcher by itself."""
    (world.pods / POD).mkdir()
    world.errors[POD] = [AlreadyExists("has a supervisor")]
    world.supervised = [[], [POD]]
    with pytest.raises(AlreadyExists):
        await world.recovery.dismantle(world.pods / POD)
    assert (world.pods / POD).exists()
    assert world.steps == []
    await world.recovery.dismantle(world.pods / POD)
    assert not (world.pods / POD).exists()
    assert world.steps == ["abandon a", "detach a"]


async def test_the_groups_of_a_pods_containers_go_with_it(world: World) -> None:
    """Nobody else knows whose they were, if the records of both are lost."""
    (world.pods / POD).mkdir()
    world.groups |= {f"/{POD}/{CONTAINER}": CONTAINER, f"/{OTHER}/{CONTAINER}": CONTAINER}
    await world.recovery.dismantle(world.pods / POD)
    assert list(world.groups) == [f"/{OTHER}/{CONTAINER}"]


async def test_a_start_goes_on_until_unknown_pods_are_removed(world: World) -> None:
    """One has a directory; the other one is known to a launcher only, which does not answer at first."""
    (world.pods / POD).mkdir()
    world.errors = {pod: [MAY_PASS["no descriptor"]] * 10 + [None] for pod in (POD, OTHER)}
    world.supervised = [*[MAY_PASS["no answer"]] * 3, [POD, OTHER]]
    await world.recovery.run()
    assert sorted(world.shut_down) == [POD, OTHER]
    assert not (world.pods / POD).exists()


async def test_what_a_launcher_has_and_the_agent_has_made_meanwhile_is_left(world: World) -> None:
    """A slot has a directory from before its supervisor is forked."""
    world.supervised = [MAY_PASS["no answer"], [OTHER]]
    recovery = asyncio.create_task(world.recovery.run())
    await asyncio.sleep(0)
    (world.pods / OTHER).mkdir()
    await recovery
    assert world.shut_down == []
    assert (world.pods / OTHER).exists()


async def test_a_pod_that_ends_for_want_of_a_supervisor_is_dismantled_to_the_end(
    world: World,
) -> None:
    """It is READY until then: so whoever cannot reach what is left of it tries again."""
    world.inventory.save(records.sandbox(READY, boot_id=boot_id()))
    (world.pods / READY).mkdir()
    gone, busy = FOR_GOOD["no files"], MAY_PASS["no descriptor"]
    world.errors[READY] = [gone, busy, gone, busy, gone, None]
    await world.recovery.run()
    assert world.shut_down == [READY]
    assert not (world.pods / READY).exists()
    assert world.inventory.sandboxes[READY].stopped_at
    assert READY not in world.inventory.pods
