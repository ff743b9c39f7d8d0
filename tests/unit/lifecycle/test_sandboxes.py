"""The order in which a pod is stopped: whoever is shown READY has its address and its host ports."""

import errno
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nodeagent.lifecycle.events import Event, Events
from nodeagent.lifecycle.inventory import Inventory, Pod
from nodeagent.lifecycle.pods import cgroup
from nodeagent.lifecycle.pods.sandboxes import Sandboxes
from nodeagent.store import Store
from nodeagent.tasks import Tasks
from tests.unit.cri import records

POD = "a" * 64


class World:
    """A node with a READY pod. `steps`: what has been done to it, and how it was listed then; `fails`: a step."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.inventory = Inventory(store, Events())
        self.inventory.save(records.sandbox(POD))
        self.inventory.pods[POD] = Pod(supervisor=SimpleNamespace())  # type: ignore[arg-type]
        self.steps: list[str] = []
        self.fails = ""
        parts: Any = {
            "inventory": self.inventory,
            "slots": SimpleNamespace(),
            "network": SimpleNamespace(detach=self._step("detach")),
            "containers": SimpleNamespace(),
            "stopping": SimpleNamespace(stop_all=self._step("kill")),
            "groups": SimpleNamespace(),
            "supervision": SimpleNamespace(shut_down=self._step("shut down")),
            "cgroups": SimpleNamespace(),
            "handlers": (),
        }
        self.sandboxes = Sandboxes(directory=folder, tasks=Tasks(), **parts)

    def _step(self, name: str) -> Any:
        async def step(_pod_id: str) -> None:
            (pod,) = self.sandboxes.list()
            self.steps.append(f"{name}: {'READY' if pod.ready else 'NOTREADY'}")
            if name == self.fails:
                raise OSError(errno.EIO, "a step fails")

        return step


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    async def remove(*_: object) -> None:
        """There is no group."""

    monkeypatch.setattr(cgroup, "remove", remove)
    with closing(Store.open(tmp_path / "state.db")) as store:
        yield World(store, tmp_path)


async def test_a_pod_is_not_ready_before_its_network_is_given_back(world: World) -> None:
    await world.sandboxes.stop(POD)
    assert world.steps == ["kill: READY", "shut down: READY", "detach: NOTREADY"]


@pytest.mark.parametrize("step", ["kill", "shut down"])
async def test_a_pod_that_cannot_be_stopped_keeps_its_network(world: World, step: str) -> None:
    """It is READY: nobody else may get what it has."""
    world.fails = step
    for _ in range(2):
        with pytest.raises(OSError, match="a step fails"):
            await world.sandboxes.stop(POD)
    assert not [done for done in world.steps if "detach" in done]
    world.fails = ""
    await world.sandboxes.stop(POD)
    assert world.steps[-1] == "detach: NOTREADY"


async def test_a_network_that_was_not_given_back_is_by_the_next_stop(world: World) -> None:
    """And the end is told once."""
    heard: list[Event] = []
    world.fails = "detach"
    async with world.inventory.events.subscribe() as events:
        with pytest.raises(OSError, match="a step fails"):
            await world.sandboxes.stop(POD)
        stopped_at = world.inventory.sandboxes[POD].stopped_at
        world.fails = ""
        for _ in range(2):
            await world.sandboxes.stop(POD)
        world.inventory.forget(world.inventory.sandboxes[POD])
        async for event in events:
            heard.append(event)
            if event.kind == "deleted":
                break
    assert [event.kind for event in heard] == ["stopped", "deleted"]
    assert heard[0].sandbox is not None
    assert heard[0].sandbox.stopped_at == stopped_at
    assert world.steps.count("detach: NOTREADY") == 3


async def test_what_is_not_written_frees_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next agent would find it READY, with an address that another pod has."""

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "a step fails")

    with monkeypatch.context() as patch:
        patch.setattr(world.inventory.store, "put", fail)
        with pytest.raises(OSError, match="a step fails"):
            await world.sandboxes.stop(POD)
    assert world.steps == ["kill: READY", "shut down: READY"]
    await world.sandboxes.stop(POD)
    assert world.steps[-1] == "detach: NOTREADY"
