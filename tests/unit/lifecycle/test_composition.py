"""The end of a node: every part of it, in an order."""

from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from nodeagent.errors import Unavailable
from nodeagent.lifecycle import composition
from nodeagent.tasks import Tasks

PARTS = ("sessions", "sandboxes", "creation", "slots", "launchers", "network")


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
