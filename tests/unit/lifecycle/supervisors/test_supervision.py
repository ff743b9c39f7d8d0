"""Work with supervisors that goes on behind the node: ends of pods, and what a start does not wait for."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import cast

import pytest

from nodeagent.errors import Unavailable
from nodeagent.lifecycle.events import Events
from nodeagent.lifecycle.inventory import Inventory, Pod
from nodeagent.lifecycle.supervisors import supervision
from nodeagent.lifecycle.supervisors.launchers import Launchers
from nodeagent.lifecycle.supervisors.supervision import Supervision
from nodeagent.records import Container
from nodeagent.sandbox.agent.client import ContainerState, Supervisor
from nodeagent.store import Store
from nodeagent.tasks import Tasks
from tests.unit.cri import records


class FakeSupervisor:
    """One that does not die."""

    def __init__(self) -> None:
        self.lost = asyncio.Event()


class Node:
    """Ends of pods fail as often as `failures` says; "gone" is a pod whose record goes meanwhile."""

    def __init__(self, inventory: Inventory, directory: Path) -> None:
        self.inventory = inventory
        self.failures: dict[str, int] = {}
        self.attempts: list[str] = []
        self.held = asyncio.Event()
        self.tasks = Tasks(sleep=lambda _: asyncio.sleep(0))
        self.supervision = Supervision(inventory, cast(Launchers, None), directory, self.tasks)
        self.supervision.end_pod = self._end_pod

    async def _end_pod(self, sandbox_id: str) -> None:
        self.attempts.append(sandbox_id)
        if sandbox_id == "held":
            await self.held.wait()
        if sandbox_id == "gone":
            del self.inventory.pods[sandbox_id]
        if self.failures.get(sandbox_id, 0):
            self.failures[sandbox_id] -= 1
            raise Unavailable("not now")

    def pod(self, sandbox_id: str, failures: int = 0) -> Supervisor:
        supervisor = cast(Supervisor, FakeSupervisor())
        self.inventory.pods[sandbox_id] = Pod(supervisor)
        self.failures[sandbox_id] = failures
        self.supervision.watch(sandbox_id, supervisor)
        return supervisor


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    with closing(Store.open(tmp_path / "state.db")) as store:
        node = Node(Inventory(store, Events()), tmp_path)
        yield node
        await node.supervision.close()


async def settle() -> None:
    """Everything that has nothing to wait for happens."""
    for _ in range(50):
        await asyncio.sleep(0)


async def test_a_pod_that_cannot_be_ended_is_tried_again(node: Node) -> None:
    node.pod("a", failures=3).on_init_exit()
    await settle()
    assert node.attempts == ["a"] * 4


async def test_nothing_is_tried_of_a_pod_that_is_gone(node: Node) -> None:
    node.pod("gone", failures=3).on_init_exit()
    await settle()
    assert node.attempts == ["gone"]


async def test_a_pod_that_is_being_ended_holds_up_no_other(node: Node) -> None:
    held = node.pod("held", failures=1)
    held.on_init_exit()
    await settle()
    held.on_init_exit()  # as each answer of its supervisor tells it again
    node.pod("other").on_init_exit()
    await settle()
    assert node.attempts == ["held", "other"]
    node.held.set()
    await settle()
    assert node.attempts == ["held", "other", "held"]


async def test_a_pod_that_was_removed_meanwhile_is_shut_down(node: Node) -> None:
    await node.supervision.shut_down("removed")


async def test_work_whose_waiter_is_cancelled_ends_with_the_node(node: Node) -> None:
    """The agent is told to end while it still starts."""
    work = asyncio.Event()
    ended = asyncio.Event()

    async def wait() -> None:
        try:
            await work.wait()
        finally:
            ended.set()

    start = asyncio.create_task(node.supervision.recover("a pod", wait))
    await settle()
    start.cancel()
    await settle()
    await node.supervision.close()
    assert ended.is_set()


async def test_what_fails_is_logged_with_its_object_and_done_again(
    node: Node, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the time that a start waits for it, and behind it; whether it was foreseen or not."""
    monkeypatch.setattr("nodeagent.tasks.FIRST_PAUSE_SECONDS", 0)
    done = asyncio.Event()
    errors: list[Exception] = [Unavailable("has gone"), KeyError("id")]

    async def work() -> None:
        if errors:
            raise errors.pop(0)
        done.set()

    await node.supervision.recover('container "late"', work)
    assert done.is_set()
    assert 'container "late": recovery: has gone; started again in 0 s' in caplog.messages
    assert "container \"late\": recovery: KeyError: 'id'; started again in 0 s" in caplog.messages


async def test_a_start_does_not_wait_for_it_for_ever(
    node: Node, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "ANSWER_SECONDS", 0)
    answer, done = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        await answer.wait()
        done.set()

    await node.supervision.recover("a pod", work)
    assert caplog.messages == ["a pod: the supervisor does not answer yet"]
    answer.set()
    await done.wait()


async def test_what_is_created_while_a_supervisor_answers_is_not_lost(node: Node) -> None:
    """Its answer lacks it; a container that was there before and that it does not know has ended."""
    killed: list[str] = []
    before = records.container("before", sandbox_id="pod")
    meanwhile = records.container("meanwhile", sandbox_id="pod")

    async def kill(container: Container) -> None:
        killed.append(container.id)

    class Answering(FakeSupervisor):
        async def state(self) -> list[ContainerState]:
            node.inventory.save(meanwhile)
            return []

    node.supervision.kill = kill
    node.inventory.save(before)
    await node.supervision._reconcile("pod", cast(Supervisor, Answering()))
    assert killed == ["before"]
    assert node.inventory.containers["before"].state == "exited"
    assert node.inventory.containers["meanwhile"].state != "exited"
