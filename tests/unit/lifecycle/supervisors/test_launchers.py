"""A launcher that cannot be replaced."""

import asyncio
from typing import cast

import pytest

from nodeagent.errors import Unavailable
from nodeagent.lifecycle.supervisors import launchers as module
from nodeagent.lifecycle.supervisors.launchers import Launchers
from nodeagent.sandbox.agent.client import Launcher
from nodeagent.tasks import Tasks


class Alive:
    def __init__(self) -> None:
        self.lost = asyncio.Event()

    def close(self) -> None:
        """It goes on."""


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
        return cast(Launcher, Alive())

    launchers = Launchers(start, Tasks())
    launchers.start()
    first = await launchers.get()
    assert launchers.trouble == ""
    first.lost.set()
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
