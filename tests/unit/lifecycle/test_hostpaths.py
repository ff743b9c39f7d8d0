"""Looks at the node's paths, off the event loop."""

import asyncio
import threading

import pytest

from nodeagent.errors import NotFound, ResourceExhausted
from nodeagent.lifecycle.hostpaths import HostPaths
from tests.node import wait_for


def absent() -> None:
    raise NotFound("device: not on this node")


async def test_a_look_returns_or_raises_what_its_function_does() -> None:
    paths = HostPaths()
    assert await paths.look("it", lambda: 7) == 7
    with pytest.raises(NotFound, match="not on this node"):
        await paths.look("it", absent)


async def test_looks_that_hang_hold_up_nobody_until_they_are_too_many() -> None:
    answered = threading.Event()
    paths = HostPaths(limit=2)
    hanging = asyncio.create_task(paths.look("first", answered.wait))
    await asyncio.sleep(0)
    assert await paths.look("second", lambda: 7) == 7
    given_up = asyncio.create_task(paths.look("third", answered.wait))
    await asyncio.sleep(0)
    given_up.cancel()
    with pytest.raises(ResourceExhausted, match="fourth: 2 looks"):
        await paths.look("fourth", lambda: 7)
    answered.set()
    assert await hanging
    await asyncio.to_thread(wait_for, "end of the third", lambda: not paths.under_way)
    assert await paths.look("fifth", lambda: 7) == 7
