"""What there is of a slot that cannot be made."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nodeagent import files
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
