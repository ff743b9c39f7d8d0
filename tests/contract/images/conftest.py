"""Images below a temporary root, and registries for them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from nodeagent.images.catalog import Images
from nodeagent.store import Store
from tests.contract.images.server import Server, serving

Opener = Callable[..., Any]


class Place:
    """A root directory that can be opened again, as after a restart."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.certs = folder / "certs.d"
        self.root.mkdir()
        self.certs.mkdir()

    @asynccontextmanager
    async def open(self, **options: Any) -> AsyncIterator[Images]:
        store = Store.open(self.root / "state.db")
        try:
            images = await Images.open(root=self.root, store=store, hosts_dir=self.certs, **options)
            try:
                yield images
            finally:
                await images.close()
        finally:
            store.close()

    def hosts(self, name: str, text: str) -> None:
        directory = self.certs / name
        directory.mkdir(exist_ok=True)
        (directory / "hosts.toml").write_text(text)

    def left(self, *folders: str) -> list[str]:
        """What is in these directories."""
        return sorted(path.name for folder in folders for path in (self.root / folder).iterdir())


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
