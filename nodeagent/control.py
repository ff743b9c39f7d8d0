"""Loading images from files, into a running agent or beside one that does not run.

The CRI has no call for it, so the agent takes archives over HTTP on a socket of its own in the state directory, which
only root can reach. Without an agent the command opens the root directory itself, under the same lock.
"""

import asyncio
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO

from aiohttp import ClientSession, UnixConnector, web

from nodeagent.config import Config
from nodeagent.errors import InvalidArgument, NodeAgentError
from nodeagent.images.catalog import Images
from nodeagent.lifecycle.node import open_images
from nodeagent.lifecycle.places import Places
from nodeagent.records import Image
from nodeagent.store import Store

CHUNK_BYTES = 1 << 20


def socket_path(config: Config) -> Path:
    return Path(config.state) / "control.sock"


# --- the agent's side ---


@asynccontextmanager
async def serve(config: Config, images: Images) -> AsyncIterator[None]:
    """Take archives while the block runs."""

    async def load(request: web.Request) -> web.Response:
        with tempfile.TemporaryFile(dir=config.root) as archive:
            async for chunk in request.content.iter_chunked(CHUNK_BYTES):
                await asyncio.to_thread(archive.write, chunk)
            archive.seek(0)
            try:
                return web.json_response([_name(image) for image in await images.load(archive)])
            except NodeAgentError as error:
                return web.Response(status=400, text=str(error))

    application = web.Application()
    application.router.add_post("/images", load)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    path = socket_path(config)
    path.unlink(missing_ok=True)
    await web.UnixSite(runner, str(path)).start()
    path.chmod(0o600)
    try:
        yield
    finally:
        await runner.cleanup()
        path.unlink(missing_ok=True)


# --- the command's side ---


def load(config: Config, file: str) -> list[str]:
    """The names of the images in a tar file, or on standard input for "-", after loading them."""
    with sys.stdin.buffer if file == "-" else Path(file).open("rb") as archive:
        running = _is_served(socket_path(config))
        return asyncio.run((_send if running else _load_here)(config, archive))


def _is_served(path: Path) -> bool:
    """An agent that was killed leaves its socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


async def _send(config: Config, archive: BinaryIO) -> list[str]:
    connector = UnixConnector(str(socket_path(config)))
    async with (
        ClientSession(connector=connector) as session,
        session.post("http://agent/images", data=archive, timeout=None) as answer,
    ):
        if answer.status != 200:
            raise InvalidArgument(await answer.text())
        names: list[str] = await answer.json()
        return names


async def _load_here(config: Config, archive: BinaryIO) -> list[str]:
    places = Places.of(config)
    with places.owned():
        async with open_images(config, places) as (_, images):
            return [_name(image) for image in await images.load(archive)]


def list_images(config: Config) -> list[str]:
    """A line an image: id, size, names. Reads the store, whether an agent runs or not."""
    path = Places.of(config).database
    if not path.exists():
        return []
    store = Store.open(path)
    try:
        return [
            f"{image.id[7:19]}  {image.size_bytes / 1e6:9.1f} MB  {_name(image)}"
            for image in store.all(Image)
        ]
    finally:
        store.close()


def _name(image: Image) -> str:
    return ", ".join(image.repo_tags or image.repo_digests or (image.id,))
