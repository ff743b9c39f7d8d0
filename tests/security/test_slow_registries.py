"""Registries that send a little and then nothing, and name servers that never answer: only who asks them waits.

The tests decide when the registry goes on. Time limits of the agent for silent servers are out of the way: none of
these pulls is saved by another one's failure.
"""

from __future__ import annotations

import asyncio
import gzip
import os
import random
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from aiohttp import web

from nodeagent.errors import DataLoss, InvalidArgument, RegistryUnavailable, ResourceExhausted
from nodeagent.images import install, turns
from nodeagent.images.catalog import Images, Limits
from nodeagent.images.remote import client, download
from nodeagent.linux import syscalls
from tests.support import tars
from tests.support.fake_registry import Server, image, layer, serving
from tests.support.images import Layer, write_archive
from tests.support.places import Place

PATIENCE = 60.0  # of the tests, with pulls that nothing holds up


@pytest.fixture(autouse=True)
def patient_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent that is patient with silent servers, but not with one that is slower than others that wait."""
    monkeypatch.setattr(client, "SILENCE_SECONDS", 3600.0)
    monkeypatch.setattr(client, "FLOOR_WINDOW_SECONDS", 3600.0)
    monkeypatch.setattr(install, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(turns, "PRESS_SECONDS", 0.05)
    monkeypatch.setattr(turns, "PACE_SECONDS", 0.1)
    monkeypatch.setattr(download, "_GRACE_SECONDS", 0.1)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
async def servers() -> AsyncIterator[tuple[Server, Server]]:
    """One of an attacker, and one of somebody else."""
    async with AsyncExitStack() as stack:
        hostile = await stack.enter_async_context(serving())
        honest = await stack.enter_async_context(serving())
        yield hostile, honest


class Stall:
    """Sends half of each layer that has these blobs, the rest when the test sets `go_on`."""

    def __init__(self, server: Server, layers: tuple[Layer, ...]) -> None:
        self.go_on = asyncio.Event()
        self.stalled: set[str] = set()
        self._digests = {tars.digest(one.blob) for one in layers}
        self._server = server
        server.hooks.append(self._hook)

    async def _hook(self, request: web.Request) -> web.StreamResponse | None:
        digest = request.path.rpartition("/")[2]
        if digest not in self._digests or self.go_on.is_set():
            return None
        data = self._server.contents[request.path][0]
        start, half = request.http_range.start or 0, len(data) // 2
        headers = {"Content-Length": str(len(data) - start)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        response = web.StreamResponse(status=206 if start else 200, headers=headers)
        await response.prepare(request)
        await response.write(data[start:half])
        self.stalled.add(request.path)
        await self.go_on.wait()
        await response.write(data[max(start, half) :])
        return response


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 (a server in this process comes to it by and by)
            await asyncio.sleep(0.01)


async def pull(images: Images, name: str) -> Path:
    """The upper layer of an image that nothing holds up."""
    async with asyncio.timeout(PATIENCE):
        return images.lower_dirs(await images.pull(name))[0]


def layers(count: int, seed: int = 0) -> tuple[Layer, ...]:
    """Layers of random content, so that their first half is not all there is to unpack."""
    source = random.Random(seed)
    return tuple(
        layer(tars.file(f"first-{number}", source.randbytes(3000)), tars.file(f"{number}"))
        for number in range(count)
    )


def serve_stalled(server: Server, count: int, per_image: int) -> tuple[Stall, list[str]]:
    """Images without a common layer, and their names."""
    made = [image(*layers(per_image, seed), tag=f"{seed}") for seed in range(count)]
    for one in made:
        server.add(one)
    stall = Stall(server, tuple(layer for one in made for layer in one.layers))
    return stall, [f"{server.host}/test/image:{seed}" for seed in range(count)]


OTHER = image(layer(tars.file("lower")), layer(tars.file("honest", b"content")))


@pytest.mark.parametrize(("count", "per_image"), [(1, 4), (1, 12), (20, 4)])
async def test_stalled_layers_hold_up_no_other_image(
    place: Place, servers: tuple[Server, Server], count: int, per_image: int
) -> None:
    """There are as many as one pull fetches at a time, more, and more than there are threads and connections."""
    hostile, honest = servers
    stall, names = serve_stalled(hostile, count, per_image)
    honest.add(OTHER)
    async with place.open() as images, asyncio.TaskGroup() as group:
        pulls = [group.create_task(images.pull(name)) for name in names]
        await until(lambda: len(stall.stalled) >= min(4 * count, download._CONNECTIONS))
        upper = await pull(images, f"{honest.host}/test/image:1")
        assert (upper / "honest").read_bytes() == b"content"
        assert not any(task.done() for task in pulls)
        stall.go_on.set()
        async with asyncio.timeout(PATIENCE):
            pulled = await asyncio.gather(*pulls)
        for one in pulled:
            names_there = {
                path.name for lower in images.lower_dirs(one) for path in lower.iterdir()
            }
            assert len(names_there) == 2 * per_image
    assert place.left("staging") == []


async def test_what_made_room_goes_on_where_it_was(
    place: Place, servers: tuple[Server, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One connection and one thread for all: those of the stalled layer are taken, and it needs no more for that."""
    monkeypatch.setattr(download, "_CONNECTIONS", 1)
    monkeypatch.setattr(install, "_UNPACKERS", 1)
    hostile, honest = servers
    stall, (name,) = serve_stalled(hostile, 1, 1)
    honest.add(OTHER)
    async with (
        place.open(limits=Limits(max_image_entries=2)) as images,
        asyncio.TaskGroup() as group,
    ):
        stalled = group.create_task(images.pull(name))
        await until(lambda: len(stall.stalled) == 1)
        await pull(images, f"{honest.host}/test/image:1")
        stall.go_on.set()
        async with asyncio.timeout(PATIENCE):
            await stalled
    begun, *resumed = hostile.asked(tars.digest(layers(1)[0].blob))
    assert not begun.http_range.start
    assert all(request.http_range.start for request in resumed)
    assert resumed


@pytest.mark.parametrize("compression", [1, 9])
async def test_a_layer_is_not_left_to_a_stalled_registry(
    place: Place, servers: tuple[Server, Server], compression: int
) -> None:
    """Chain IDs are in the image that the attacker names; the blobs may be the same ones or not."""
    hostile, honest = servers
    shared = layers(6)
    hostile.add(image(*shared))
    repacked = [
        Layer(gzip.compress(gzip.decompress(one.blob), compression), one.diff_id) for one in shared
    ]
    honest.add(image(*repacked, *OTHER.layers))
    stall = Stall(hostile, shared)
    async with place.open() as images, asyncio.TaskGroup() as group:
        stalled = group.create_task(images.pull(f"{hostile.host}/test/image:1"))
        await until(lambda: len(stall.stalled) == 4)
        upper = await pull(images, f"{honest.host}/test/image:1")
        assert (upper / "honest").read_bytes() == b"content"
        assert not stall.go_on.is_set()
        async with asyncio.timeout(PATIENCE):
            await stalled  # all of its layers have come from elsewhere
        assert images.counters.layers_fetched == 8
    assert place.left("staging") == []


async def test_a_layer_is_not_left_to_many_stalled_pulls(
    place: Place, servers: tuple[Server, Server]
) -> None:
    """Each of which has its own answer from the registry: who has waited for one waits for no other."""
    hostile, honest = servers
    (shared,) = layers(1)
    repacked = [
        Layer(gzip.compress(gzip.decompress(shared.blob), mtime=n), shared.diff_id)
        for n in range(10)
    ]
    for number, one in enumerate(repacked):
        hostile.add(image(one, tag=f"{number}"))
    honest.add(image(shared, *OTHER.layers))
    stall = Stall(hostile, tuple(repacked))
    async with place.open() as images, asyncio.TaskGroup() as group:
        for number in range(10):
            group.create_task(images.pull(f"{hostile.host}/test/image:{number}"))
        await until(lambda: len(stall.stalled) == 10)
        await pull(images, f"{honest.host}/test/image:1")
    assert place.left("staging") == []


async def test_a_layer_of_a_registry_that_has_stopped(
    place: Place, servers: tuple[Server, Server]
) -> None:
    """The same blob of the same servers: it is asked for again once the first answer has stopped."""
    server, _ = servers
    (shared,) = layers(1)
    server.add(image(shared))
    server.add(image(shared, *OTHER.layers, tag="2"))
    stall = Stall(server, (shared,))
    async with place.open() as images, asyncio.TaskGroup() as group:
        stalled = group.create_task(images.pull(f"{server.host}/test/image:1"))
        await until(lambda: len(stall.stalled) == 1)
        server.hooks.clear()
        await pull(images, f"{server.host}/test/image:2")
        async with asyncio.timeout(PATIENCE):
            await stalled


async def test_an_archive_does_not_wait_for_a_registry(
    place: Place, servers: tuple[Server, Server], tmp_path: Path
) -> None:
    """All that is to be loaded is here."""
    hostile, _ = servers
    hostile.add(OTHER)
    stall = Stall(hostile, OTHER.layers)
    archive = tmp_path / "archive.tar"
    write_archive(OTHER, archive)
    async with place.open() as images, asyncio.TaskGroup() as group:
        stalled = group.create_task(images.pull(f"{hostile.host}/test/image:1"))
        await until(lambda: len(stall.stalled) == 2)
        async with asyncio.timeout(PATIENCE):
            (loaded,) = await images.load(archive)
            assert (images.lower_dirs(loaded)[0] / "honest").read_bytes() == b"content"
            await stalled


async def test_wrong_content_is_nobody_elses(
    place: Place, servers: tuple[Server, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for a layer that turns out to be another one fetches it, and gets what its own digests say."""
    monkeypatch.setattr(install, "PATIENCE_SECONDS", 3600.0)
    hostile, honest = servers
    right = OTHER.layers[1]
    wrong = Layer(layer(tars.file("honest", b"hostile")).blob, right.diff_id)
    hostile.add(image(OTHER.layers[0], wrong))
    honest.add(OTHER)
    stall = Stall(hostile, (wrong,))
    async with place.open() as images, asyncio.TaskGroup() as group:
        stalled = asyncio.create_task(images.pull(f"{hostile.host}/test/image:1"))
        await until(lambda: len(stall.stalled) == 1)
        waiting = group.create_task(pull(images, f"{honest.host}/test/image:1"))
        await until(lambda: len(honest.asked("/manifests/")) == 1)
        stall.go_on.set()
        with pytest.raises(DataLoss):
            await stalled
        assert ((await waiting) / "honest").read_bytes() == b"content"
    assert place.left("staging") == []


async def test_a_layer_cannot_be_the_text_that_its_chain_id_is_the_digest_of(
    place: Place, servers: tuple[Server, Server]
) -> None:
    """The chain ID of a lowest layer is the digest of its content, that of others the digest of a text."""
    hostile, _ = servers
    text = " ".join(one.diff_id for one in OTHER.layers).encode()
    hostile.add(image(Layer(gzip.compress(text), tars.digest(text))))
    async with place.open() as images:
        with pytest.raises(InvalidArgument):
            await pull(images, f"{hostile.host}/test/image:1")
    assert place.left("staging", "layers") == []


# --- what else a pull could hold ---


async def test_name_servers_that_do_not_answer(
    place: Place, servers: tuple[Server, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lookups cannot be cancelled: those that hang keep no thread from others, neither of images nor of the agent."""
    _, honest = servers
    honest.add(OTHER)
    answer, asked = threading.Event(), []
    look_up = socket.getaddrinfo

    def getaddrinfo(host: str, *arguments: Any, **options: Any) -> Any:
        if host.endswith(".test"):
            asked.append(host)
            answer.wait()
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")
        return look_up(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    port = honest.host.rpartition(":")[2]
    try:
        async with place.open() as images, asyncio.TaskGroup() as group:
            names = [f"registry-{number}.test/a/b:1" for number in range(40)]
            failing = [group.create_task(_fails(images, name)) for name in names]
            await until(lambda: len(asked) >= 40)
            async with asyncio.timeout(PATIENCE):
                assert await asyncio.to_thread(lambda: "here") == "here"
            await pull(images, f"localhost:{port}/test/image:1")
            answer.set()
            await asyncio.gather(*failing)
    finally:
        answer.set()


async def _fails(images: Images, name: str) -> None:
    with pytest.raises(RegistryUnavailable):
        await images.pull(name)


async def test_archives_that_do_not_end(place: Place, servers: tuple[Server, Server]) -> None:
    """An archive may be a pipe, which takes as long as whoever writes to it likes."""
    _, honest = servers
    honest.add(OTHER)
    async with place.open() as images, asyncio.TaskGroup() as group:
        writers = []
        for _ in range(40):
            reader, writer = os.pipe()
            writers.append(writer)
            group.create_task(_is_no_archive(images, os.fdopen(reader, "rb")))
        try:
            async with asyncio.timeout(PATIENCE):
                assert await asyncio.to_thread(lambda: "here") == "here"
            await pull(images, f"{honest.host}/test/image:1")
        finally:
            for writer in writers:
                os.close(writer)


async def _is_no_archive(images: Images, reader: BinaryIO) -> None:
    with reader, pytest.raises(InvalidArgument):
        await images.load(reader)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    syscalls.mount("tmpfs", str(folder), "tmpfs", 0, "size=64m")
    yield folder
    syscalls.umount2(str(folder), syscalls.MNT_DETACH)


async def test_blobs_leave_the_reserve_of_the_disk(
    small_disk: Path, servers: tuple[Server, Server]
) -> None:
    """There was room when it began. It is no layer, so that the blob alone takes space, to its end."""
    hostile, _ = servers
    blob = random.Random(1).randbytes(40 << 20)
    hostile.add(image(Layer(blob, tars.digest(blob))))
    stall = Stall(hostile, (Layer(blob, ""),))
    place = Place(small_disk)
    async with place.open() as images:
        task = asyncio.create_task(images.pull(f"{hostile.host}/test/image:1"))
        await until(lambda: bool(place.left("staging")) and _free(small_disk) <= 44 << 20)
        (small_disk / "others").write_bytes(bytes(_free(small_disk) - (10 << 20)))
        stall.go_on.set()
        least = _free(small_disk)
        while not task.done():
            least = min(least, _free(small_disk))
            await asyncio.sleep(0)
        with pytest.raises(ResourceExhausted, match="kept"):
            await task
    assert least > 0


def _free(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize
