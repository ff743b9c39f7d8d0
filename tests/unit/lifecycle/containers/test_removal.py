"""What a creation has made is undone step by step; the record goes last."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from nodeagent.errors import FailedPrecondition, ResourceExhausted, Unavailable
from nodeagent.lifecycle.containers import removal as module
from nodeagent.lifecycle.containers.creation import Creation
from nodeagent.lifecycle.containers.removal import Removal
from nodeagent.lifecycle.events import Events
from nodeagent.lifecycle.inventory import Inventory, Pod
from nodeagent.sandbox.agent.client import Supervisor
from nodeagent.store import Store
from tests.support.faults import impatient_tasks, until
from tests.unit.cri import records

STEPS = ("supervisor", "cgroup", "files", "images")


class Node:
    """The parts that a container is removed from; those in `failing` fail, and `done` has what was done."""

    def __init__(self, inventory: Inventory) -> None:
        self.inventory = inventory
        self.failing: set[str] = set()
        self.hanging = asyncio.Event()
        self.hangs = False
        self.done: set[str] = set()
        supervisor = SimpleNamespace(remove=self._remove)
        inventory.pods["pod"] = Pod(cast(Supervisor, supervisor))
        self.container = records.container("c", sandbox_id="pod", created_at=0)
        inventory.save(self.container)
        groups: Any = SimpleNamespace(remove=self._remove_group)
        images: Any = SimpleNamespace(release=self._release)
        directories: Any = SimpleNamespace(take=self._take)
        self.tasks = impatient_tasks()
        self.removal = Removal(inventory, groups, images, directories, self.tasks)

    def _do(self, step: str) -> None:
        if step in self.failing:
            raise FailedPrecondition(f"{step} hangs")
        self.done.add(step)

    async def _remove(self, _container: str) -> None:
        if self.hangs:
            await self.hanging.wait()
        self._do("supervisor")

    async def _release(self, _container: str) -> None:
        self._do("images")

    async def _take(self, _container: str) -> None:
        self._do("files")

    async def _remove_group(self, _container: object) -> None:
        self._do("cgroup")


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    with closing(Store.open(tmp_path / "state.db")) as store:
        node = Node(Inventory(store, Events()))
        yield node
        await node.removal.close()


@pytest.mark.parametrize("failing", STEPS)
async def test_one_step_that_fails_keeps_no_other_from_being_done(node: Node, failing: str) -> None:
    """The record is kept, and with it the name; when the step succeeds, both go."""
    node.failing = {failing}
    await node.removal.undo(node.container)
    assert node.done == {*STEPS} - {failing}
    assert node.removal.why_left("c") == f"{failing} hangs"
    assert "c" in node.inventory.containers
    node.failing.clear()
    await until(lambda: "c" not in node.inventory.containers)
    assert node.removal.why_left("c") is None


async def test_what_hangs_is_not_waited_for_and_named_to_a_retry(
    node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "UNDO_SECONDS", 0.01)
    node.hangs = True
    await node.removal.undo(node.container)
    assert caplog.messages == ['container "c": its creation cannot be undone yet, which goes on']
    nothing = cast(Any, None)
    creation = Creation(
        inventory=node.inventory,
        images=nothing,
        cgroups=nothing,
        groups=nothing,
        planner=nothing,
        cdi=nothing,
        removal=node.removal,
        directories=nothing,
        tasks=node.tasks,
    )
    with pytest.raises(
        Unavailable, match=r'container "main": an earlier creation .* being undone: it has'
    ):
        creation._refuse_duplicate(records.sandbox("pod"), node.container.config)
    node.hanging.set()
    await until(lambda: not node.inventory.containers)
    creation._refuse_duplicate(records.sandbox("pod"), node.container.config)


async def test_a_removal_that_fails_keeps_the_record(node: Node) -> None:
    node.failing = {"cgroup"}
    with pytest.raises(FailedPrecondition, match="cgroup hangs"):
        await node.removal.clear(node.container)
    assert "c" in node.inventory.containers
    assert node.done == {*STEPS} - {"cgroup"}


async def test_a_supervisor_forgets_an_exit_code_when_the_record_has_it(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that is killed in between knows the code from one of the two."""
    inventory, store = node.inventory, node.inventory.store
    running = records.container("r", sandbox_id="pod", created_at=1, started_at=2)
    inventory.save(running)
    ended = msgspec.structs.replace(running, finished_at=3, exit_code=7)

    def fail(_: object) -> None:
        raise ResourceExhausted("the disk is full")

    monkeypatch.setattr(store, "put", fail)
    inventory.note(ended, "stopped")
    with pytest.raises(ResourceExhausted):
        await node.removal.clear(ended)
    assert "supervisor" not in node.done
    monkeypatch.undo()
    await node.removal.clear(ended)
    assert "supervisor" in node.done
