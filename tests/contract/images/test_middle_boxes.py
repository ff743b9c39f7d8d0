"""What stands between a node and a registry: boxes that compress, and limits on how often one may ask."""

from __future__ import annotations

import asyncio
import gzip
import random
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from aiohttp import web

from nodeagent.errors import InvalidArgument, RegistryUnavailable
from nodeagent.images import manifest
from nodeagent.images.catalog import Images
from nodeagent.images.remote import client, source, throttling
from tests.support import tars
from tests.support.fake_registry import Handler, Server, image, layer, send_part
from tests.support.places import Place

CONTENT = random.Random(1).randbytes(300_000)
SAMPLE = image(layer(tars.file("a", CONTENT)))
BLOB = tars.digest(SAMPLE.layers[0].blob)
CONFIG = tars.digest(SAMPLE._config("amd64"))


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SILENCE_SECONDS", 2)
    monkeypatch.setattr(source, "FIRST_PAUSE_SECONDS", 0.01)


def compressing(
    server: Server,
    part: str = "",
    coding: str = "gzip",
    how: Callable[[bytes], bytes] = gzip.compress,
) -> Handler:
    """Compresses every answer whose path has this part, whatever the client accepts."""

    async def compress(request: web.Request) -> web.Response | None:
        if part not in request.path or request.path not in server.contents:
            return None
        data, media_type = server.contents[request.path]
        headers = {"Content-Type": media_type, "Content-Encoding": coding}
        return web.Response(body=how(data), headers=headers)

    return compress


async def pulled(images: Images, server: Server) -> Path:
    """The layer of the pulled sample."""
    (only,) = images.lower_dirs(await images.pull(f"{server.host}/test/image:1"))
    return only


@pytest.mark.parametrize(("coding", "how"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_everything_is_compressed(
    images: Images, server: Server, coding: str, how: Callable[[bytes], bytes]
) -> None:
    server.add(SAMPLE)
    server.hooks.append(compressing(server, coding=coding, how=how))
    assert (await pulled(images, server) / "a").read_bytes() == CONTENT


async def test_a_digest_is_that_of_the_document(images: Images, server: Server) -> None:
    top = server.add(SAMPLE)
    server.hooks.append(compressing(server, "/manifests/"))
    found = await images.pull(f"{server.host}/test/image@{top}")
    assert found.repo_digests == (f"{server.host}/test/image@{top}",)


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_token_is_compressed(images: Images, server: Server, chunked: bool) -> None:
    server.add(SAMPLE)

    async def guard(request: web.Request) -> web.StreamResponse | None:
        if request.path == "/token":
            response = web.Response(
                body=gzip.compress(b'{"access_token":"t"}'), headers={"Content-Encoding": "gzip"}
            )
            if chunked:
                response.enable_chunked_encoding()
            return response
        if request.headers.get("Authorization") == "Bearer t":
            return None
        challenge = f'Basic realm="r", Bearer realm="{server.url}/token"'
        return web.Response(status=401, headers={"WWW-Authenticate": challenge})

    server.hooks.append(guard)
    await pulled(images, server)


async def test_what_an_error_says_is_compressed(images: Images, server: Server) -> None:
    async def refuse(request: web.Request) -> web.Response:
        body = gzip.compress(b'{"errors":[{"code":"DENIED","message":"pay first"}]}')
        return web.Response(status=500, body=body, headers={"Content-Encoding": "gzip"})

    server.hooks.append(refuse)
    with pytest.raises(RegistryUnavailable, match="500: denied pay first"):
        await pulled(images, server)


async def test_a_blob_that_is_said_to_be_compressed_is_as_it_is(
    images: Images, server: Server
) -> None:
    """Stores keep that a layer is gzip as its Content-Encoding: it is no coding, for the length is the blob's own."""
    server.add(SAMPLE)
    starts = []

    async def label(request: web.Request) -> web.StreamResponse | None:
        if "/blobs/" not in request.path:
            return None
        starts.append(request.http_range.start or 0)
        answer = server.answer(request)
        answer.headers["Content-Encoding"] = "gzip"
        if BLOB in request.path and len(server.asked(BLOB)) == 1:
            assert request.transport is not None
            await send_part(request, server.contents[request.path][0], 200_000, answer.headers)
            request.transport.close()
        return answer

    server.hooks.append(label)
    assert (await pulled(images, server) / "a").read_bytes() == CONTENT
    assert starts[-1] > 0


async def test_a_compressed_blob_that_breaks_off_begins_anew(
    images: Images, server: Server
) -> None:
    """A range of it would count other bytes."""
    server.add(SAMPLE)
    data = gzip.compress(SAMPLE.layers[0].blob)

    async def break_off(request: web.Request) -> web.StreamResponse | None:
        if BLOB not in request.path or len(server.asked(BLOB)) > 1:
            return None
        assert request.transport is not None
        response = await send_part(request, data, 200_000, {"Content-Encoding": "gzip"})
        request.transport.close()
        return response

    server.hooks += [break_off, compressing(server, BLOB)]
    assert (await pulled(images, server) / "a").read_bytes() == CONTENT
    assert not server.requests[-1].http_range.start


@pytest.mark.parametrize("coding", ["identity", " , Identity"])
async def test_a_blob_that_is_said_not_to_be_compressed_goes_on(
    images: Images, server: Server, coding: str
) -> None:
    """Where it broke off, though the answer does not state its length."""
    server.add(SAMPLE)
    starts = []

    async def label(request: web.Request) -> web.StreamResponse | None:
        if BLOB not in request.path:
            return None
        starts.append(request.http_range.start or 0)
        answer = server.answer(request)
        answer.headers["Content-Encoding"] = coding
        if len(starts) == 1:
            assert request.transport is not None
            response = web.StreamResponse(headers=answer.headers)
            response.enable_chunked_encoding()
            await response.prepare(request)
            await response.write(server.contents[request.path][0][:200_000])
            request.transport.close()
        return answer

    server.hooks.append(label)
    assert (await pulled(images, server) / "a").read_bytes() == CONTENT
    assert len(starts) == 2
    assert starts[1] > 0


async def test_a_compressed_document_has_a_bound(images: Images, server: Server) -> None:
    path = "/v2/test/image/manifests/1"
    server.contents[path] = bytes(256 << 20), manifest.OCI_MANIFEST
    server.hooks.append(
        compressing(server, how=lambda data: zlib.compress(data, 1), coding="deflate")
    )
    with pytest.raises(InvalidArgument, match="longer than"):
        await pulled(images, server)


async def test_a_compressed_config_has_a_bound(images: Images, server: Server) -> None:
    server.add(SAMPLE)
    bomb = gzip.compress(bytes(256 << 20), 1)
    server.hooks.append(compressing(server, CONFIG, how=lambda _: bomb))
    with pytest.raises(Exception, match=f"{CONFIG}: longer"):
        await pulled(images, server)


@pytest.mark.parametrize(
    ("coding", "how", "text"),
    [
        ("br", bytes, '"br", which was not asked for'),
        ("gzip", bytes, "damaged gzip"),
        ("gzip", lambda data: gzip.compress(data)[:-12], "cut off gzip|not asked|damaged"),
    ],
)
async def test_what_cannot_be_decoded_is_named(
    images: Images, server: Server, coding: str, how: Callable[[bytes], bytes], text: str
) -> None:
    server.add(SAMPLE)
    server.hooks.append(compressing(server, "/manifests/", coding, how))
    with pytest.raises(RegistryUnavailable, match=text):
        await pulled(images, server)


# --- limits ---


class Limit:
    """Refuses what has `part` in its path, `times` times, and remembers when it was asked."""

    def __init__(self, server: Server, times: int, part: str = "", **headers: str) -> None:
        self.times = times
        self.asked: list[float] = []
        self._part = part
        self._headers = {name.replace("_", "-"): value for name, value in headers.items()}
        server.hooks.insert(0, self.handle)

    async def handle(self, request: web.Request) -> web.StreamResponse | None:
        if self._part not in request.path:
            return None
        self.asked.append(time.monotonic())
        if len(self.asked) > self.times:
            return None
        body = {"errors": [{"code": "TOOMANYREQUESTS", "message": "log in for more"}]}
        return web.json_response(body, status=429, headers=self._headers)


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the server does not tell how long."""
    monkeypatch.setattr(throttling, "FIRST_SECONDS", 0.05)


@pytest.mark.parametrize("part", ["/manifests/", CONFIG, BLOB])
async def test_a_pause_is_waited_for(images: Images, server: Server, part: str) -> None:
    server.add(SAMPLE)
    limit = Limit(server, 1, part, Retry_After="1")
    await pulled(images, server)
    assert limit.asked[1] - limit.asked[0] >= 0.99
    assert len(limit.asked) == 2


async def test_a_pause_until_a_date_of_the_server(images: Images, server: Server) -> None:
    """Whose clock is years behind."""
    server.add(SAMPLE)

    async def refuse(request: web.Request) -> web.Response | None:
        if len(server.requests) > 1:
            return None
        headers = {
            "Date": "Fri, 29 Nov 2019 10:00:00 GMT",
            "Retry-After": "Fri, 29 Nov 2019 10:00:01 GMT",
        }
        return web.Response(status=503, headers=headers)

    server.hooks.append(refuse)
    began = time.monotonic()
    await pulled(images, server)
    assert time.monotonic() - began >= 0.99


@pytest.mark.usefixtures("short_pauses")
async def test_more_pauses_than_other_failures_are_waited_for(
    images: Images, server: Server
) -> None:
    server.add(SAMPLE)
    limit = Limit(server, source.REFUSALS - 1)
    await pulled(images, server)
    first, second = limit.asked[1] - limit.asked[0], limit.asked[2] - limit.asked[1]
    assert first >= 0.05
    assert second >= 2 * 0.05


@pytest.mark.usefixtures("short_pauses")
async def test_pauses_come_to_an_end(images: Images, server: Server) -> None:
    limit = Limit(server, 1000)
    with pytest.raises(
        RegistryUnavailable, match=r"^RegistryUnavailable: .*429: toomanyrequests log in for more"
    ):
        await pulled(images, server)
    assert len(limit.asked) == source.REFUSALS


async def test_a_long_pause_is_told_at_once(images: Images, server: Server) -> None:
    limit = Limit(server, 1000, Retry_After="3600")
    began = time.monotonic()
    for _ in range(2):
        with pytest.raises(RegistryUnavailable, match=r"a pause.* 3[56]\d\d s") as caught:
            await pulled(images, server)
        assert str(caught.value).startswith(
            f'RegistryUnavailable: image "{server.host}/test/image:1": {server.url}'
        )
    assert time.monotonic() - began < throttling.LONGEST_SECONDS
    assert len(limit.asked) == 1


async def test_all_the_pauses_of_a_pull_have_a_bound(
    images: Images, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "HELD_UP_SECONDS", 1.5)
    server.add(SAMPLE)
    Limit(server, 1, "/manifests/", Retry_After="1")
    Limit(server, 1, BLOB, Retry_After="1")
    with pytest.raises(RegistryUnavailable, match="pause of 1 s"):
        await pulled(images, server)


async def test_a_mirror_that_wants_a_pause_is_left(
    place: Place, servers: tuple[Server, Server]
) -> None:
    mirror, server = servers
    server.add(SAMPLE)
    limit = Limit(mirror, 1000, Retry_After="50")
    place.hosts(server.host, f'[host."{mirror.url}"]')
    began = time.monotonic()
    async with place.open() as images:
        await pulled(images, server)
    assert time.monotonic() - began < 50
    assert len(limit.asked) == 1


async def test_many_pulls_share_a_pause(images: Images, server: Server) -> None:
    """None of 40 layers of 8 images asks before the pause is over, and then one goes first."""
    wanted = [
        image(
            *(layer(tars.file(f"{number}-{n}")) for n in range(5)),
            repository=f"test/image-{number}",
        )
        for number in range(8)
    ]
    for one in wanted:
        server.add(one)
    refused_at = under_way = 0.0
    widths: list[float] = []
    early: list[str] = []

    async def limited(request: web.Request) -> web.StreamResponse | None:
        nonlocal refused_at, under_way
        if "/blobs/" not in request.path:
            return None
        if not refused_at:
            refused_at = time.monotonic()
            await asyncio.sleep(0.3)  # the others that are on their way come meanwhile
            refused_at = time.monotonic()
            return web.Response(status=429, headers={"Retry-After": "3"})
        passed = time.monotonic() - refused_at
        if 1.5 < passed < 3:  # those that were on their way are there by then
            early.append(request.path)
        if passed < 3:
            return web.Response(status=429, headers={"Retry-After": "3"})
        under_way += 1
        widths.append(under_way)
        await asyncio.sleep(0.02)
        under_way -= 1
        return server.answer(request)

    server.hooks.append(limited)
    async with asyncio.TaskGroup() as group:
        for one in wanted:
            group.create_task(images.pull(f"{server.host}/{one.repository}:1"))
    assert not early
    assert widths[:2] == [1, 1]
    assert len(images.list()) == len(wanted)
