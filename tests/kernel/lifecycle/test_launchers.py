"""The launcher of a node, across its death and across those who wait for it."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from nodeagent.lifecycle.supervisors.launchers import Launchers
from nodeagent.sandbox.agent.client import Launcher
from nodeagent.tasks import Tasks


@pytest.fixture
async def launchers(tmp_path: Path) -> AsyncIterator[Launchers]:
    launchers = Launchers(partial(Launcher.connect_or_start, tmp_path), Tasks())
    yield launchers
    launcher = await launchers.get()
    await launcher.stop()


async def test_a_launcher_that_dies_is_replaced(launchers: Launchers) -> None:
    first = await launchers.get()
    assert await launchers.get() is first
    os.kill(first.pid, signal.SIGKILL)
    await first.lost.wait()
    second = await launchers.get()
    assert second.pid != first.pid
    assert await second.pods() == []


async def test_a_launcher_comes_up_though_who_asked_for_it_is_gone(
    launchers: Launchers, tmp_path: Path
) -> None:
    asking = asyncio.create_task(launchers.get())
    while not (tmp_path / "launcher.log").exists():  # noqa: ASYNC110 another process does it
        await asyncio.sleep(0)
    asking.cancel()
    with suppress(asyncio.CancelledError):
        await asking
    launcher = await launchers.get()
    assert await launcher.pods() == []
