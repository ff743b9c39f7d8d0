"""What stands between a node and a registry: boxes that compress, and limits on how often one may ask."""

from __future__ import annotations

import gzip
import random
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from aiohttp import web

from nodeagent.errors import InvalidArgument, RegistryUnavailable
from nodeagent.images import client, manifest, source
from nodeagent.images.catalog import Images
from tests import tars
from tests.fake_registry import Handler, Server, image, layer, send_part

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
