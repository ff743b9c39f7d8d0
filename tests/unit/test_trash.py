"""Files on their way out."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nodeagent import files, trash
from nodeagent.tasks import Tasks
from nodeagent.trash import Trash
from tests.support.faults import impatient_tasks, until


@pytest.fixture
async def tasks() -> AsyncIterator[Tasks]:
    async with impatient_tasks() as tasks:
        yield tasks


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Kinds of trees that cannot be removed."""
    kinds: set[str] = set()
    real = files.remove_tree

    def remove_tree(path: str) -> None:
        if os.path.basename(path).partition("-")[0] in kinds:
            raise OSError(1, "Operation not permitted", path)
        real(path)

    monkeypatch.setattr(files, "remove_tree", remove_tree)
    return kinds


def tree(path: Path) -> Path:
    (path / "below").mkdir(parents=True)
    return path


def left(folder: Path) -> list[str]:
    return [path.name.partition("-")[0] for path in (folder / "trash").iterdir()]


async def test_what_is_taken_goes_at_once_and_is_removed(tmp_path: Path, tasks: Tasks) -> None:
    bin_ = Trash(tmp_path / "trash", "trash", tasks)
    taken = tree(tmp_path / "taken")
    bin_.take(taken)
    assert not taken.exists()
    bin_.take(taken)  # has gone already
    made = tree(bin_.path("made"))
    bin_.discard(made)
    await bin_.emptied()
    assert left(tmp_path) == []
    await bin_.close()


async def test_what_an_earlier_agent_left_is_removed(tmp_path: Path, tasks: Tasks) -> None:
    tree(tmp_path / "trash/left")
    bin_ = Trash(tmp_path / "trash", "trash", tasks)
    await bin_.emptied()
    assert left(tmp_path) == []
    await bin_.close()


async def test_a_tree_that_cannot_be_removed_holds_up_no_other(
    tmp_path: Path, tasks: Tasks, stuck: set[str]
) -> None:
    bin_ = Trash(tmp_path / "trash", "trash", tasks)
    stuck.add("stuck")
    for name in ("stuck", "other"):
        bin_.take(tree(tmp_path / name))
    await bin_.emptied()
    assert left(tmp_path) == ["stuck"]
    assert "stuck" in tasks.failures.by_name["trash"].last_error
    await bin_.close()


async def test_a_tree_that_cannot_be_removed_is_tried_again(
    tmp_path: Path, tasks: Tasks, stuck: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trash, "RETRY_SECONDS", 0.001)
    bin_ = Trash(tmp_path / "trash", "trash", tasks)
    stuck.add("stuck")
    bin_.take(tree(tmp_path / "stuck"))
    await until(lambda: tasks.failures.by_name["trash"].count >= 3)
    stuck.clear()
    await until(lambda: left(tmp_path) == [])
    await bin_.close()


async def test_the_end_finishes_what_was_taken(
    tmp_path: Path, tasks: Tasks, stuck: set[str]
) -> None:
    bin_ = Trash(tmp_path / "trash", "trash", tasks)
    stuck.add("stuck")
    for name in ("a", "stuck", "b"):
        bin_.take(tree(tmp_path / name))
    await bin_.close()
    assert left(tmp_path) == ["stuck"]
    assert asyncio.all_tasks() == {asyncio.current_task()}
