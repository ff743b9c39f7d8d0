"""Work with supervisors that goes on behind the node: ends of pods, and what a start does not wait for."""

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from nodeagent.errors import Unavailable
from nodeagent.lifecycle.events import Events
from nodeagent.lifecycle.inventory import Inventory, Pod
from nodeagent.lifecycle.supervisors import polling, supervision
from nodeagent.lifecycle.supervisors.launchers import Launchers
from nodeagent.lifecycle.supervisors.supervision import Supervision
from nodeagent.records import Container
from nodeagent.sandbox import exits
from nodeagent.sandbox.agent.client import ContainerState, Supervisor
from nodeagent.sandbox.spec import Exit
from nodeagent.store import Store
from nodeagent.tasks import Tasks
from tests.support.faults import until
from tests.unit.cri import records


class FakeSupervisor:
    """One that does not die; its connection may end."""

    silent = ""

    def __init__(self) -> None:
        self.lost, self.ended = asyncio.Event(), asyncio.Event()
        self.is_closed = False

    @property
    def is_lost(self) -> bool:
        return self.lost.is_set()

    async def has_died(self) -> bool:
        return self.lost.is_set()

    async def shutdown(self) -> None:
        """It ends."""

    def close(self) -> None:
        self.is_closed = True


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


async def test_a_pod_whose_exit_record_cannot_be_read_can_be_stopped_again(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.pod("a")
    node.inventory.save(records.container("c", sandbox_id="a", created_at=1, started_at=2))

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(exits, "read", fail)
    with pytest.raises(OSError, match="Input/output"):
        await node.supervision.shut_down("a")
    monkeypatch.undo()
    await node.supervision.shut_down("a")
    assert node.inventory.pods["a"].supervisor is None
    assert node.inventory.containers["c"].state == "exited"


async def test_work_that_has_not_ended_ends_with_the_node(node: Node) -> None:
    """The agent is told to end while it still starts."""
    work = asyncio.Event()
    ended = asyncio.Event()

    async def wait() -> None:
        try:
            await work.wait()
        finally:
            ended.set()

    node.supervision.recover("a pod", wait)
    await settle()
    await node.supervision.close()
    assert ended.is_set()


async def test_what_fails_is_logged_with_its_object_and_done_again(
    node: Node, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it was foreseen or not."""
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


# --- connections that end, and news that is lost ---


class Connecting:
    """Connects to the next of these supervisors; an error is raised instead."""

    def __init__(self, patch: pytest.MonkeyPatch, *found: FakeSupervisor | Exception) -> None:
        self.left = list(found)
        patch.setattr(Supervisor, "connect", self._connect)

    async def _connect(self, *_: object) -> Supervisor:
        found = self.left.pop(0)
        if isinstance(found, Exception):
            raise found
        return cast(Supervisor, found)


class Knowing(FakeSupervisor):
    """Knows one container, which has ended with 7."""

    error: Exception | None = None

    async def remove(self, container: str) -> None:
        """It had one that nobody knows."""

    async def state(self) -> list[ContainerState]:
        if self.error is not None:
            raise self.error
        end = Exit(code=7, at=9, oom=False)
        known = SimpleNamespace(id="c", started_at=1, exit=end)
        return [cast(ContainerState, known)]


async def test_a_connection_that_has_ended_is_made_again_and_the_state_asked_for(
    node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The agent has no descriptor left for the first attempt: no launcher is asked for a successor."""
    node.inventory.save(records.container("c", sandbox_id="pod", started_at=1))
    first, second = node.pod("pod"), Knowing()
    Connecting(monkeypatch, OSError(errno.EMFILE, "Too many open files"), second)
    first.ended.set()
    await until(lambda: node.inventory.containers["c"].state == "exited")
    assert node.inventory.containers["c"].exit_code == 7
    assert node.inventory.pods["pod"].supervisor is cast(Supervisor, second)
    assert cast(FakeSupervisor, first).is_closed
    assert caplog.messages[0] == 'pod sandbox "pod": the connection to its supervisor has ended'


async def test_an_end_whose_news_was_lost_is_asked_for(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.inventory.save(records.container("c", sandbox_id="pod", started_at=1))
    node.inventory.pods["pod"] = Pod(cast(Supervisor, knowing := Knowing()))
    node.supervision.watch("pod", cast(Supervisor, knowing))
    monkeypatch.setattr(polling, "PERIOD_SECONDS", 0.001)
    asking = polling.Polling(node.inventory, node.supervision, node.tasks)
    asking.start()
    await until(lambda: node.inventory.containers["c"].state == "exited")
    await asking.close()


async def test_a_start_under_way_is_left_to_whoever_started_it(node: Node) -> None:
    node.inventory.save(records.container("c", sandbox_id="pod"))
    node.inventory.pods["pod"] = Pod(cast(Supervisor, knowing := Knowing()))
    node.supervision.watch("pod", cast(Supervisor, knowing))
    await node.supervision.check("pod")
    assert node.inventory.containers["c"].state == "created"


async def test_a_supervisor_that_is_silent_is_no_failure_of_the_task(node: Node) -> None:
    node.inventory.pods["pod"] = Pod(cast(Supervisor, knowing := Knowing()))
    node.supervision.watch("pod", cast(Supervisor, knowing))
    knowing.error = TimeoutError("process 7 does not answer")
    await node.supervision.check("pod")


async def test_a_pod_is_listed_and_refuses_politely_before_it_is_reached(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.supervision.expect("pod")
    Connecting(monkeypatch, *[OSError(errno.EMFILE, "Too many open files")] * 4, Knowing())
    monkeypatch.setattr(supervision, "PAUSES_SECONDS", (0, 0, 0))
    pod = node.inventory.pods["pod"]
    with pytest.raises(OSError, match="Too many"):
        await node.supervision.adopt("pod")
    assert pod.supervisor is not None
    assert "not reached yet: [Errno 24] Too many open files" in pod.supervisor.silent
    with pytest.raises(Unavailable, match=r'pod "pod": its supervisor is not reached yet'):
        await pod.supervisor.start("c")
    with pytest.raises(Unavailable), pod.creation("pod"):
        pass
    await node.supervision.adopt("pod")
    assert pod.supervisor.silent == ""


async def test_a_pod_that_was_stopped_meanwhile_is_not_taken_over(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.supervision.expect("pod")
    found = Knowing()

    async def connect(*_: object) -> Supervisor:
        node.inventory.pods["pod"].supervisor = None
        return cast(Supervisor, found)

    monkeypatch.setattr(Supervisor, "connect", connect)
    await node.supervision.adopt("pod")
    assert found.is_closed
    assert node.inventory.pods["pod"].supervisor is None


async def test_a_pod_that_is_being_stopped_is_not_taken_over(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its supervisor is about to end; a successor, made by whoever watches it, would outlive the pod."""
    node.supervision.expect("pod")
    expected = node.inventory.pods["pod"].supervisor
    found = Knowing()

    async def connect(*_: object) -> Supervisor:
        node.inventory.pods["pod"].closing = True
        return cast(Supervisor, found)

    monkeypatch.setattr(Supervisor, "connect", connect)
    await node.supervision.adopt("pod")
    assert found.is_closed
    assert node.inventory.pods["pod"].supervisor is expected
    found.is_closed = False
    await node.supervision.adopt("pod")
    assert not found.is_closed
