"""Faults that the agent has had, put back for a test: the simulation finds each of them within some seeds."""

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import pytest

from nodeagent.errors import AlreadyExists, NodeAgentError
from nodeagent.lifecycle.containers.removal import Removal
from nodeagent.lifecycle.creations import Creations
from nodeagent.lifecycle.inventory import Inventory, Pod
from nodeagent.lifecycle.pods.sandboxes import Sandboxes
from nodeagent.records import Sandbox
from tests.chaos.simulation import campaign

SEEDS = 500

pytestmark = pytest.mark.timeout(900)


@contextmanager
def name_not_released() -> Iterator[None]:
    """Where an undo fails, the record of the pod stays until the agent starts again, and keeps its name."""

    async def undo_once(self: Any, slot: Any, sandbox: Sandbox) -> None:
        with contextlib.suppress(NodeAgentError, OSError):
            await self._clear(slot, sandbox)

    def refuse_duplicate(self: Any, config: Any) -> None:
        for other in self._inventory.sandboxes.values():
            if (other.config.name, other.config.attempt) == (config.name, config.attempt):
                raise AlreadyExists(f"{config.name} is {other.id}")

    with (
        patch.object(Sandboxes, "_undo", undo_once),
        patch.object(Sandboxes, "_refuse_duplicate", refuse_duplicate),
    ):
        yield


@contextmanager
def error_of_another_creation() -> Iterator[None]:
    """A creation gets the error of one with another name, which failed a moment before."""

    def drop_unclaimed(self: Any) -> None:
        for key, task in list(self._tasks.items()):
            if task.done() and not self._exists(task.result()):
                del self._tasks[key]

    with patch.object(Creations, "_drop_unclaimed", drop_unclaimed):
        yield


@contextmanager
def stop_waits_for_a_creation() -> Iterator[None]:
    """StopPodSandbox waits for the undo of a creation, however long that takes, before it kills anything."""

    async def undo(self: Any, container: Any) -> None:
        await self._tasks.keep("undo", lambda: self._undo(container), about=container.id)

    async def stop(self: Any, sandbox: Sandbox, pod: Pod) -> None:
        pod.closing = True
        for task in tuple(pod.creating):
            task.cancel()
        if pod.creating:
            await asyncio.wait(pod.creating)
        await real(self, sandbox, pod)

    real = Sandboxes._stop
    with patch.object(Removal, "undo", undo), patch.object(Sandboxes, "_stop", stop):
        yield


@contextmanager
def event_of_a_removal_told_twice() -> Iterator[None]:
    """Two removals of one pod at the same time both fail, or forget what the first has forgotten."""

    def forget(self: Any, record: Any) -> None:
        self.store.delete(type(record), record.id)
        table: dict[str, Any] = self.sandboxes if isinstance(record, Sandbox) else self.containers
        del table[record.id]
        self.pods.pop(record.id, None)
        self._members.pop(record.id, None)
        self._locks.pop(record.id, None)
        if not isinstance(record, Sandbox):
            self._members.get(record.sandbox_id, {}).pop(record.id, None)

    with patch.object(Inventory, "forget", forget):
        yield


BUGS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    bug.__name__: bug
    for bug in (
        name_not_released,
        error_of_another_creation,
        stop_waits_for_a_creation,
        event_of_a_removal_told_twice,
    )
}


@pytest.mark.parametrize("name", BUGS)
def test_an_old_bug_is_found(name: str) -> None:
    command = [sys.executable, __file__, name]
    environment = {**os.environ, "PYTHONHASHSEED": campaign.HASH_SEED, "PYTHONPATH": os.getcwd()}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 1, found.stderr
    assert found.stdout, "nothing was found"


def main(name: str) -> int:
    with BUGS[name](), campaign.ready() as directory:
        for seed, outcome in campaign.failures(range(SEEDS), directory):
            print(f"seed {seed}: {outcome.violation}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
