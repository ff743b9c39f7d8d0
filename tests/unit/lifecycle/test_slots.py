"""What there is of a slot that cannot be made."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nodeagent import files
from nodeagent.errors import Unavailable
from nodeagent.lifecycle.pods import slots as module
from nodeagent.lifecycle.pods.slots import USUAL, Slots
from nodeagent.requests import Namespaces
from tests.support.faults import ERRORS, Fault, impatient_tasks, until


async def detach(_: str) -> None:
    """There is no network."""


NETWORK: Any = SimpleNamespace(detach=detach)


async def test_a_slot_whose_undo_fails_is_undone_behind_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a descriptor nothing is made, and nothing is removed; nobody would come back to it."""
    remove_tree, failures = files.remove_tree, 2

    def remove(path: str) -> None:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise OSError(errno.EMFILE, "Too many open files", path)
        remove_tree(path)

    async def get() -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(files, "remove_tree", remove)
    launchers: Any = SimpleNamespace(get=get)
    async with impatient_tasks() as tasks:
        slots = Slots(launchers, NETWORK, tmp_path, 0, tasks)
        with pytest.raises(OSError, match="Too many open files"):
            await slots.take(USUAL)
        assert slots.ids == set(os.listdir(tmp_path))  # it is nobody's stray
        await until(lambda: not slots.ids)
        await slots.close()
    assert os.listdir(tmp_path) == []


async def test_a_slot_that_cannot_be_discarded_at_the_end_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove_tree, fault = files.remove_tree, Fault(ERRORS["OSError"])

    async def shutdown() -> None:
        """Nothing runs in it."""

    async def fork(_: object) -> Any:
        return SimpleNamespace(is_lost=False, shutdown=shutdown)

    async def get() -> Any:
        return SimpleNamespace(fork=fork)

    monkeypatch.setattr(files, "remove_tree", fault.before(remove_tree))
    monkeypatch.setattr(module, "USUAL", Namespaces(network="node"))
    launchers: Any = SimpleNamespace(get=get)
    async with impatient_tasks() as tasks:
        slots = Slots(launchers, NETWORK, tmp_path, 1, tasks)
        slots.start()
        await until(lambda: slots.ready == 1)
        fault.once()
        await slots.close()
    assert not slots.ids
    assert os.listdir(tmp_path) == []


class FakeHandles:
    net = route = -1

    def __enter__(self) -> None:
        """They are none."""

    def __exit__(self, *_: object) -> None:
        """They are none."""


class FakeSupervisor:
    is_lost = False

    async def namespaces(self) -> Any:
        return FakeHandles()

    async def shutdown(self) -> None:
        """It has nothing to end."""


async def test_a_slot_that_has_gone_bad_is_discarded_behind_the_caller(tmp_path: Path) -> None:
    """Without a launcher its supervisor has no successor, which is to end it; the pod gets another slot meanwhile."""
    made: list[Any] = []
    attempts = 0

    async def fork(_plan: object) -> Any:
        made.append(FakeSupervisor())
        return made[-1]

    async def get() -> Any:
        return SimpleNamespace(fork=fork)

    async def shutdown() -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise Unavailable("there is no launcher")

    async def attach(*_: object) -> Any:
        return SimpleNamespace(addresses=())

    async def detach(_: str) -> None:
        """There is no network."""

    launchers: Any = SimpleNamespace(get=get)
    network: Any = SimpleNamespace(attach=attach, detach=detach, hands_out=lambda _: True)
    async with impatient_tasks() as tasks:
        slots = Slots(launchers, network, tmp_path, 1, tasks)
        slots.start()
        await until(lambda: slots.ready == 1)
        (bad,) = slots.ids
        made[0].is_lost, made[0].shutdown = True, shutdown
        taken = await slots.take(USUAL)
        assert taken.id != bad
        await until(lambda: bad not in slots.ids)
        assert not (tmp_path / bad).exists()
        assert attempts == 2
        await slots.close()


async def test_what_a_fork_has_left_is_undone_until_that_succeeds(tmp_path: Path) -> None:
    failures, undone = 2, []

    async def fork(_plan: object) -> Any:
        raise Unavailable("launcher: is disconnected")

    async def undo_fork(pod_id: str, _directory: Path) -> None:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise Unavailable("launcher: is disconnected")
        undone.append(pod_id)

    async def get() -> Any:
        return SimpleNamespace(fork=fork, undo_fork=undo_fork)

    async def detach(_: str) -> None:
        """There is no network."""

    launchers: Any = SimpleNamespace(get=get)
    network: Any = SimpleNamespace(detach=detach)
    async with impatient_tasks() as tasks:
        slots = Slots(launchers, network, tmp_path, 0, tasks)
        with pytest.raises(Unavailable):
            await slots.take(USUAL)
        (left,) = slots.ids
        await until(lambda: not slots.ids)
        await slots.close()
    assert undone == [left]
