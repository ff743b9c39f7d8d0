"""A launcher that cannot be replaced."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from nodeagent.errors import Unavailable
from nodeagent.lifecycle.supervisors import launchers as module
from nodeagent.lifecycle.supervisors.launchers import Launchers
from nodeagent.sandbox.agent.client import Launcher
from nodeagent.tasks import Tasks
from tests.support.faults import until


class Fake:
    """A launcher whose connection may end."""

    def __init__(self) -> None:
        self.lost, self.ended = asyncio.Event(), asyncio.Event()

    async def has_died(self) -> bool:
        return self.lost.is_set()

    def close(self) -> None:
        """It goes on."""

    def die(self) -> None:
        self.lost.set()
        self.ended.set()


async def test_why_there_is_none_is_known_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.001)
    attempts = 0

    async def start() -> Launcher:
        nonlocal attempts
        attempts += 1
        if 1 < attempts < 5:
            raise Unavailable("no memory")
        return cast(Launcher, Fake())

    launchers = Launchers(start, Tasks())
    launchers.start()
    first = await launchers.get()
    assert launchers.trouble == ""
    cast(Fake, first).die()
    while attempts < 3:  # noqa: ASYNC110 the keeper does it
        await asyncio.sleep(0.001)
    assert launchers.trouble == "no memory"
    while attempts < 5:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    await launchers.get()
    assert launchers.trouble == ""
    await launchers.close()
    assert [m for m in caplog.messages if "no memory" in m] == [
        "launcher: no memory; started again in 0.001 s"
    ]


async def test_one_that_lives_is_connected_to_again(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever has ended the connection, and whether somebody needs it or not."""
    made: list[Fake] = []

    async def start() -> Launcher:
        made.append(Fake())
        return cast(Launcher, made[-1])

    launchers = Launchers(start, Tasks())
    launchers.start()
    await launchers.get()
    made[0].ended.set()
    await until(lambda: len(made) == 2)
    await launchers.close()
    made[1].ended.set()
    assert await launchers.get() is cast(Launcher, made[2])
    assert caplog.messages == ["the connection to the launcher has ended, connecting again"] * 2


async def test_one_after_the_other_that_dies_at_once_is_replaced_with_pauses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paused: list[float] = []
    go_on = asyncio.Event()

    async def pause(seconds: float) -> None:
        paused.append(seconds)
        if len(paused) == 6:
            await go_on.wait()

    async def start() -> Launcher:
        launcher = Fake()
        launcher.die()
        return cast(Launcher, launcher)

    monkeypatch.setattr(module, "asyncio", Asyncio(pause))
    launchers = Launchers(start, Tasks())
    launchers.start()
    await until(lambda: len(paused) == 6)
    await launchers.close()
    assert paused == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]


class Asyncio:
    """The module with pauses of its own."""

    def __init__(self, sleep: Callable[[float], Awaitable[None]]) -> None:
        self.sleep = sleep

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)
