"""Removals: those that cannot be written, and those that come second."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec
import pytest

from nodeagent.errors import Unavailable
from nodeagent.lifecycle.events import Events
from nodeagent.lifecycle.inventory import Inventory
from nodeagent.records import Container, Sandbox
from nodeagent.requests import ContainerConfig, Resources, SandboxConfig
from nodeagent.store import Store

SANDBOX = Sandbox(
    id="pod",
    config=SandboxConfig(name="pod", uid="u", namespace="n"),
    runtime_handler="",
    cgroup_parent="/pod",
    boot_id="b",
    created_at=1,
    addresses=(),
)
CONTAINER = Container(
    id="container",
    sandbox_id="pod",
    config=ContainerConfig(name="c", image="i"),
    image_id="i",
    image_ref="i",
    image_name="i",
    mounts=(),
    cgroup_path="/pod/c",
    log_path="",
    resources=Resources(),
    stop_signal=15,
)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another process writes, and does not end."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


@pytest.mark.parametrize("record", [SANDBOX, CONTAINER])
def test_a_record_stays_until_its_removal_is_written(
    tmp_path: Path, record: Sandbox | Container
) -> None:
    """That of an intention as well: whoever undoes it tries again, and its row is not left to the next agent."""
    path = tmp_path / "state.db"
    with closing(Store.open(path)) as store:
        inventory = Inventory(store, Events())
        inventory.save(record)
        with locked(path), pytest.raises(Unavailable, match="locked"):
            inventory.forget(record)
        assert [*inventory.sandboxes.values(), *inventory.containers.values()] == [record]
        inventory.forget(record)
        assert store.get(type(record), record.id) is None


def test_what_others_can_name_stays_until_its_removal_is_written(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    made = msgspec.structs.replace(CONTAINER, created_at=1)
    with closing(Store.open(path)) as store:
        inventory = Inventory(store, Events())
        inventory.save(made)
        with locked(path), pytest.raises(Unavailable, match="locked"):
            inventory.forget(made)
        assert inventory.members("pod") == [made]


def test_what_was_only_noted_is_written_before_its_pod_has_stopped(tmp_path: Path) -> None:
    """Nobody would tell the next agent."""
    path = tmp_path / "state.db"
    made = msgspec.structs.replace(CONTAINER, created_at=1, started_at=2)
    ended = msgspec.structs.replace(made, finished_at=3, exit_code=7)
    with closing(Store.open(path)) as store:
        inventory = Inventory(store, Events())
        inventory.save(made)
        with locked(path):
            inventory.note(ended, "stopped")
            with pytest.raises(Unavailable, match="locked"):
                inventory.write_noted(inventory.members("pod"))
        assert store.get(Container, made.id) == made
        inventory.write_noted(inventory.members("pod"))
        assert store.get(Container, made.id) == ended


@pytest.mark.parametrize("record", [SANDBOX, CONTAINER])
async def test_of_two_removals_at_once_one_is_told(
    tmp_path: Path, record: Sandbox | Container
) -> None:
    changed = {"ready_at": 1} if isinstance(record, Sandbox) else {"created_at": 1}
    made = msgspec.structs.replace(record, **changed)
    with closing(Store.open(tmp_path / "state.db")) as store:
        events = Events()
        inventory = Inventory(store, events)
        inventory.save(made)
        async with events.subscribe() as told:
            inventory.forget(made)
            inventory.forget(made)
            inventory.save(made, "created")
            kinds = [(await anext(told)).kind for _ in range(2)]
        assert kinds == ["deleted", "created"]
