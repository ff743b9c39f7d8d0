"""Root directories of images for tests: opened, closed, and opened again as after a restart."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from nodeagent.images.catalog import Images
from nodeagent.images.remote.client import open_session
from nodeagent.store import Store
from nodeagent.tasks import Tasks


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
            async with open_session() as session:
                images = await Images.open(
                    root=self.root,
                    store=store,
                    hosts_dir=self.certs,
                    session=session,
                    tasks=Tasks(),
                    **options,
                )
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
