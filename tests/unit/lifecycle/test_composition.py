"""The end of a node: every part of it, in an order."""

import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nodeagent import files
from nodeagent.errors import Unavailable
from nodeagent.lifecycle import composition
from nodeagent.sandbox import paths
from nodeagent.tasks import Tasks

PARTS = (
    "reconciliation", "sessions", "sandboxes", "creation", "slots", "launchers", "network"
)  # fmt: skip


@pytest.mark.parametrize("failing", ["", *PARTS[:-1]])
async def test_each_part_ends_whatever_another_has_failed_of(failing: str) -> None:
    ended: list[str] = []

    def closing(name: str) -> Callable[..., Awaitable[None]]:
        async def close(**_: bool) -> None:
            ended.append(name)
            if name == failing:
                raise Unavailable(name)

        return close

    node: Any = SimpleNamespace(tasks=Tasks(), busy=True)
    for name in PARTS:
        setattr(node, name, SimpleNamespace(close=closing(name)))
    if failing:
        with pytest.raises(Unavailable, match=failing):
            await composition._end(node, node.launchers)
    else:
        await composition._end(node, node.launchers)
    assert ended == list(PARTS)


@pytest.mark.parametrize("is_stuck", [False, True])
async def test_what_a_killed_supervisor_has_left_goes_with_the_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_stuck: bool
) -> None:
    """Its mounts first; a slot that could not be discarded goes as well, what is left of a stopped pod does not."""
    done: list[str] = []

    async def note(*_: object, **__: object) -> None:
        """Nothing is to be done."""

    async def stop() -> None:
        done.append("launcher")

    async def end_groups() -> None:
        done.append("groups")

    async def pods() -> list[str]:
        return ["stray"]

    async def get() -> Any:
        return SimpleNamespace(pods=pods, abandon=note, stop=stop)

    def unpin(directory: str) -> bool:
        done.append(f"unpin {Path(directory).name}")
        return True

    def fail(path: str) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)

    for name in ("stray", "slot", "stopped"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(paths, "unpin", unpin)
    if is_stuck:
        monkeypatch.setattr(files, "remove_tree", fail)
    node: Any = SimpleNamespace(
        busy=False,
        network=SimpleNamespace(close=note),
        sandboxes=SimpleNamespace(list=lambda: [SimpleNamespace(id="stopped")]),
        places=SimpleNamespace(pods=tmp_path),
        reconciliation=SimpleNamespace(end_groups=end_groups),
        cgroups=SimpleNamespace(remove_instance=lambda: done.append("instance")),
    )
    await composition._leave(node, cast(Any, SimpleNamespace(get=get)))
    assert (done[0], *done[-2:]) == ("launcher", "groups", "instance")
    assert set(done[1:-2]) == {"unpin stray", "unpin slot"}
    left = {"stray", "slot", "stopped"} if is_stuck else {"stopped"}
    assert set(os.listdir(tmp_path)) == left
