"""Strays of each kind are found twice, named, removed and counted; what has a record, or is under way, is none."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from nodeagent import files
from nodeagent.errors import Unavailable
from nodeagent.lifecycle.events import Events
from nodeagent.lifecycle.inventory import Inventory
from nodeagent.lifecycle.reconcile import KINDS, Reconciliation
from nodeagent.records import Container
from nodeagent.store import Store
from nodeagent.tasks import Tasks
from tests.unit.cri import records

POD, CONTAINER, STRAY = "a" * 64, "b" * 64, "f" * 64


class World:
    """A node with a pod, and a container in it; `removed` has what is removed."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.inventory = Inventory(store, Events())
        self.inventory.save(records.sandbox(POD))
        self.inventory.save(records.container(CONTAINER, sandbox_id=POD))
        self.pods, self.containers = folder / "pods", folder / "containers"
        (self.pods / POD).mkdir(parents=True)
        (self.containers / CONTAINER).mkdir(parents=True)
        (self.pods / "rehearsal").mkdir()
        self.supervised, self.holders, self.leases = {POD}, {CONTAINER}, {POD}
        self.groups = {"/pods/a/b": CONTAINER, "/pods/a/a": POD}
        self.slots, self.under_way, self.recovering = set[str](), set[str](), set[str]()
        self.error: Exception | None = None
        self.removed: list[str] = []
        parts: Any = {
            "inventory": self.inventory,
            "launchers": SimpleNamespace(get=self._launcher),
            "slots": SimpleNamespace(ids=self.slots),
            "creation": SimpleNamespace(is_under_way=self.under_way.__contains__),
            "containers": SimpleNamespace(clear_stranger=self._clear, undo=self._undo),
            "network": SimpleNamespace(holders=self.leases, detach=self._detach),
            "images": SimpleNamespace(holders=self.holders, release=self._release),
            "cgroups": SimpleNamespace(
                of_pods_without_parent=lambda: dict(self.groups), end=self._end_group
            ),
            "places": SimpleNamespace(pods=self.pods, containers=self.containers),
        }
        self.reconciliation = Reconciliation(**parts, tasks=Tasks())
        self.reconciliation.dismantle = self._dismantle
        self.reconciliation.is_recovering = self.recovering.__contains__

    async def _launcher(self) -> Any:
        async def pods() -> list[str]:
            if self.error is not None:
                raise self.error
            return list(self.supervised)

        return SimpleNamespace(pods=pods)

    async def _dismantle(self, directory: Path) -> None:
        self.supervised.discard(directory.name)
        await asyncio.to_thread(files.remove_tree, str(directory))
        self.removed.append(f"pod {directory.name[0]}")

    async def _clear(self, name: str) -> None:
        (self.containers / name).rmdir()
        self.removed.append(f"container {name[0]}")

    async def _undo(self, container: Container) -> None:
        self.inventory.forget(container)
        self.removed.append(f"intention {container.id[0]}")

    async def _detach(self, name: str) -> None:
        self.leases.discard(name)
        self.removed.append(f"lease {name[0]}")

    async def _release(self, name: str) -> None:
        self.holders.discard(name)
        self.removed.append(f"hold {name[0]}")

    def _end_group(self, path: str) -> None:
        del self.groups[path]
        self.removed.append(f"cgroup {path[-1]}")

    def add(self, kind: str) -> None:
        """Leave a thing of this kind that nobody knows of."""
        if kind == "pod":
            (self.pods / STRAY).mkdir()
        elif kind == "supervisor":
            self.supervised.add(STRAY)
        elif kind == "container":
            (self.containers / STRAY).mkdir()
        elif kind == "intention":
            self.inventory.save(records.container(STRAY, sandbox_id=POD, created_at=0))
        elif kind == "orphan":
            self.inventory.save(records.container(STRAY, sandbox_id="e" * 64))
        elif kind == "lease":
            self.leases.add(STRAY)
        elif kind == "cgroup":
            self.groups["/pods/e/f"] = STRAY
        else:
            self.holders.add(STRAY)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    with closing(Store.open(tmp_path / "state.db")) as store:
        yield World(store, tmp_path)


AS = {"supervisor": "pod", "orphan": "intention"}


@pytest.mark.parametrize("kind", [*KINDS, *AS])
async def test_a_stray_is_removed_when_it_is_seen_again(
    world: World, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    world.add(kind)
    named = AS.get(kind, kind)
    await world.reconciliation.look()
    assert world.removed == []
    await world.reconciliation.look()
    assert world.removed == [f"{named} f"]
    assert world.reconciliation.leaks == {**dict.fromkeys(KINDS, 0), named: 1}
    assert caplog.messages == [f'{named} "{STRAY}": no record explains it; removing it']
    for _ in range(2):
        await world.reconciliation.look()
    assert world.removed == [f"{named} f"]


@pytest.mark.parametrize("kind", [*KINDS, *AS])
async def test_what_is_under_way_is_none(world: World, kind: str) -> None:
    world.add(kind)
    named = AS.get(kind, kind)
    where = {"pod": world.slots, "lease": world.slots, "intention": world.under_way}
    where.get(named, world.recovering).add(STRAY)
    for _ in range(3):
        await world.reconciliation.look()
    assert world.removed == []


async def test_what_is_seen_once_is_left(world: World) -> None:
    """It was just being made, or removed."""
    for _ in range(3):
        world.add("lease")
        await world.reconciliation.look()
        world.leases.discard(STRAY)
        await world.reconciliation.look()
    assert world.removed == []


async def test_what_cannot_be_removed_is_no_leak_yet_and_tried_again(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(_directory: Path) -> None:
        raise Unavailable("not now")

    world.add("pod")
    dismantle, world.reconciliation.dismantle = world.reconciliation.dismantle, fail
    for _ in range(2):
        await world.reconciliation.look()
    assert f'pod "{STRAY}": cannot be removed yet: not now' in caplog.messages
    assert not world.reconciliation.leaks.total()
    world.reconciliation.dismantle = dismantle
    await world.reconciliation.look()
    assert world.reconciliation.leaks["pod"] == 1


async def test_a_launcher_that_does_not_answer_hides_nothing_else(world: World) -> None:
    world.error = Unavailable("launcher: died")
    world.add("container")
    for _ in range(2):
        await world.reconciliation.look()
    assert world.removed == ["container f"]


async def test_a_stopped_pod_and_its_containers_are_records(world: World) -> None:
    stopped = msgspec.structs.replace(world.inventory.sandboxes[POD], stopped_at=9)
    world.inventory.save(stopped)
    world.leases.clear()
    for _ in range(2):
        await world.reconciliation.look()
    assert world.removed == []


async def test_a_stopped_pod_has_no_network(world: World) -> None:
    """Its stop gives that back last, and may have failed; a kubelet does not stop a pod again that is NOTREADY."""
    stopped = msgspec.structs.replace(world.inventory.sandboxes[POD], stopped_at=9)
    world.inventory.save(stopped)
    for _ in range(3):
        await world.reconciliation.look()
    assert world.removed == ["lease a"]


async def test_an_agent_that_ends_leaves_no_group_that_only_it_would_find(world: World) -> None:
    world.add("cgroup")
    await world.reconciliation.end_groups()
    assert world.removed == ["cgroup f"]
    assert world.groups == {"/pods/a/b": CONTAINER, "/pods/a/a": POD}
