"""Images below a temporary root, and registries for them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from nodeagent.images.catalog import Images
from tests.fake_registry import Server, serving
from tests.places import Place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
async def images(place: Place) -> AsyncIterator[Images]:
    async with place.open() as opened:
        yield opened


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving() as started:
        yield started


@pytest.fixture
async def servers() -> AsyncIterator[tuple[Server, Server]]:
    """A mirror and a registry."""
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(serving())
        second = await stack.enter_async_context(serving())
        yield first, second
