"""Loading of images from files, into a running agent or without one.

The CRI has no call for it, so the agent takes archives on a socket of its own in the state directory, which only root
can reach. A client sends one archive in chunks, each after its length in four bytes, the last one empty; the answer is
JSON. Without an agent the command opens the root directory itself, under the same lock.
"""

import asyncio
import json
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import BinaryIO, TypedDict

from nodeagent import disk_reserve
from nodeagent.config import Config
from nodeagent.errors import (
    DataLoss,
    InvalidArgument,
    NodeAgentError,
    NotFound,
    Unavailable,
    Unsupported,
)
from nodeagent.images.catalog import Images
from nodeagent.lifecycle.composition import open_images
from nodeagent.lifecycle.places import Places
from nodeagent.records import Image
from nodeagent.serving import listener
from nodeagent.serving.listener import Listener, Place
from nodeagent.store import Store
from nodeagent.tasks import Tasks

MAX_ARCHIVES = 8
CHUNK_BYTES = 1 << 20
BEGIN_SECONDS = 10.0


class Answer(TypedDict, total=False):
    """The answer to an archive: the images' names, or an error."""

    names: list[str]
    error: str


def socket_path(config: Config) -> Path:
    return Path(config.state) / "control.sock"


# --- the agent's side ---


@asynccontextmanager
async def serve(config: Config, images: Images, tasks: Tasks) -> AsyncIterator[None]:
    """Accept archives while the block runs."""
    path = socket_path(config)
    archives = Listener(
        listener.bind_unix(path),
        lambda connection, place: _take(connection, place, Path(config.root), images),
        name="control socket",
        places=MAX_ARCHIVES,
        head_s=BEGIN_SECONDS,
        tasks=tasks,
    )
    async with archives.open():
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


async def _take(connection: socket.socket, place: Place, root: Path, images: Images) -> None:
    reader, writer = await asyncio.open_connection(sock=connection)
    try:
        # Beside the layers, which need the room anyway; it has no name (O_TMPFILE), so that a crash leaves nothing.
        with tempfile.TemporaryFile(dir=root) as archive:
            answer = await _spool(reader, place, archive, root) or await _load(images, archive)
        writer.write(json.dumps(answer).encode())
        writer.close()
        await writer.wait_closed()
    finally:
        writer.transport.abort()


async def _spool(
    reader: asyncio.StreamReader, place: Place, archive: BinaryIO, root: Path
) -> Answer:
    """Write all that comes to a file. A failure is the answer, which a client reads after it has sent everything."""
    failure: Answer = {}
    while chunk := await _receive(reader):
        place.keep()
        try:
            if not failure:
                disk_reserve.require_space(root, len(chunk))
                await asyncio.to_thread(archive.write, chunk)
        except (NodeAgentError, OSError) as error:
            failure = {"error": str(error)}
    archive.seek(0)
    return failure


async def _receive(reader: asyncio.StreamReader) -> bytes:
    """Read the next chunk. Raises ConnectionError where the client stops before the end of its archive."""
    try:
        size = int.from_bytes(await reader.readexactly(4), "big")
        if size > CHUNK_BYTES:
            raise ConnectionError(f"a chunk of {size} bytes")
        return await reader.readexactly(size)
    except asyncio.IncompleteReadError:
        raise ConnectionResetError("the archive is incomplete") from None


async def _load(images: Images, archive: BinaryIO) -> Answer:
    try:
        return {"names": [_name(image) for image in await images.load(archive)]}
    except (NodeAgentError, OSError) as error:
        return {"error": str(error)}


# --- the command's side ---


def load(config: Config, file: str) -> list[str]:
    """Load the images in a tar file, or on standard input for "-", and return their names."""
    with sys.stdin.buffer if file == "-" else Path(file).open("rb") as archive:
        running = _is_served(socket_path(config))
        try:
            return asyncio.run((_send if running else _load_here)(config, archive))
        except (DataLoss, InvalidArgument, NotFound, Unsupported) as error:
            raise type(error)(f"{file}: {error}") from None


def _is_served(path: Path) -> bool:
    """Whether an agent listens: one that was killed leaves its socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


async def _send(config: Config, archive: BinaryIO) -> list[str]:
    reader, writer = await asyncio.open_unix_connection(socket_path(config))
    try:
        while chunk := await asyncio.to_thread(archive.read, CHUNK_BYTES):
            writer.write(len(chunk).to_bytes(4, "big") + chunk)
            await writer.drain()
        writer.write(bytes(4))
        said = await reader.read()
    except ConnectionError:
        said = b""
    finally:
        writer.transport.abort()
    if not said:
        raise Unavailable(
            "the agent has closed the connection; see its log (journalctl -u nodeagent)"
        )
    answer: Answer = json.loads(said)
    if "error" in answer:
        raise InvalidArgument(answer["error"])
    return answer["names"]


async def _load_here(config: Config, archive: BinaryIO) -> list[str]:
    places = Places.of(config)
    with places.owned():
        async with open_images(config, places) as (_, images):
            return [_name(image) for image in await images.load(archive)]


def list_images(config: Config) -> list[str]:
    """A line for each image, with id, size and names. Reads the store, whether an agent runs or not."""
    places = Places.of(config)
    if not places.database.exists():
        return []
    with closing(Store.copy_of(places.database, places.journal)) as store:
        return [
            f"{image.id[7:19]}  {image.size_bytes / 1e6:9.1f} MB  {_name(image)}"
            for image in store.all(Image)
        ]


def _name(image: Image) -> str:
    return ", ".join(image.repo_tags or image.repo_digests or (image.id,))
