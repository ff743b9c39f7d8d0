import os
from collections.abc import AsyncIterator

import pytest

from nodeagent.streaming.server import StreamingServer
from nodeagent.streaming.session import Timeouts
from nodeagent.tasks import Tasks
from tests.contract.streaming.children import Children
from tests.contract.streaming.waiting import eventually

TIMEOUTS = Timeouts(head_s=0.5, creation_s=0.5, idle_s=20.0, last_output_s=0.3, first_size_s=0.2)


@pytest.fixture
async def backend() -> AsyncIterator[Children]:
    """Every test gives back every descriptor."""
    before = len(os.listdir("/proc/self/fd"))
    children = Children()
    yield children
    await children.close()
    await eventually(lambda: len(os.listdir("/proc/self/fd")) <= before)


@pytest.fixture
async def server(backend: Children) -> AsyncIterator[StreamingServer]:
    async with StreamingServer(backend, Tasks(), timeouts=TIMEOUTS) as server:
        yield server
