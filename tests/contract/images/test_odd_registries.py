"""Registries that keep the letter of the protocol, and none of its habits."""

from __future__ import annotations

import base64

import pytest
from aiohttp import web

from nodeagent.errors import RegistryUnavailable
from nodeagent.images.catalog import Auth, Images
from tests.support import images as made
from tests.support import tars
from tests.support.fake_registry import Handler, Server, image, layer
from tests.support.places import Place

SAMPLE = image(layer(tars.file("a", b"content")))
BASIC = "Basic " + base64.b64encode(b"me:hidden").decode()


async def works(images: Images, server: Server, auth: Auth | None = None) -> None:
    server.add(SAMPLE)
    pulled = await images.pull(f"{server.host}/test/image:1", auth)
    assert (images.lower_dirs(pulled)[0] / "a").read_bytes() == b"content"


async def test_no_heads_lengths_types_or_digests(images: Images, server: Server) -> None:
    """HEAD is not allowed, and all answers are chunked and of one type, without any header that might be left out."""

    async def answer(request: web.Request) -> web.StreamResponse | None:
        if request.method != "GET":
            return web.Response(status=405)
        if request.path not in server.contents:
            return None
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(server.contents[request.path][0])
        await response.write_eof()
        return response

    server.hooks.append(answer)
    await works(images, server)


async def test_documents_of_no_type_that_was_asked_for(images: Images, server: Server) -> None:
    """A store of files negotiates: it has application/json, or nothing that is accepted."""

    async def negotiate(request: web.Request) -> web.Response | None:
        accepted = request.headers.get("Accept", "*/*")
        return None if "*/*" in accepted else web.Response(status=406)

    server.hooks.append(negotiate)
    await works(images, server)


def hopping(hops: int, status: int) -> Handler:
    """So many relative redirects before each answer."""

    async def hop(request: web.Request) -> web.Response | None:
        at = int(request.query.get("hop", "0"))
        if at == hops:
            return None
        location = f"./{request.path.rpartition('/')[2]}?hop={at + 1}"
        return web.Response(status=status, headers={"Location": location})

    return hop


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_as_many_redirects_as_others_follow(
    images: Images, server: Server, status: int
) -> None:
    server.hooks.append(hopping(10, status))
    await works(images, server)


async def test_more_redirects_than_anybody_follows(images: Images, server: Server) -> None:
    server.hooks.append(hopping(11, 307))
    with pytest.raises(RegistryUnavailable, match="more than 10 redirects"):
        await works(images, server)


@pytest.mark.parametrize(
    "challenges",
    [
        ['Basic realm="r", Bearer realm="{}/token",service=x'],
        ['Bearer realm="{}/token"', 'Basic realm="r"'],
        ['BASIC realm="r"', "bearer Realm={}/token"],
        ['Negotiate, Bearer  realm = "{}/token" , scope="" , error="invalid_token"'],
    ],
)
@pytest.mark.parametrize(
    "answer",
    [
        {"token": "t"},
        {"access_token": "t"},
        {"token": "t", "access_token": "t", "expires_in": "soon", "issued_at": None},
        {"token": None, "access_token": "t", "expires_in": 0, "refresh_token": None},
    ],
)
async def test_challenges_and_tokens(
    images: Images, server: Server, challenges: list[str], answer: dict[str, object]
) -> None:
    async def guard(request: web.Request) -> web.Response | None:
        if request.path == "/token":
            assert request.headers["Authorization"] == BASIC
            return web.Response(status=203, body=made.encode(answer))
        if request.headers.get("Authorization") == "Bearer t":
            return None
        response = web.Response(status=401)
        for challenge in challenges:
            response.headers.add("WWW-Authenticate", challenge.format(server.url))
        return response

    server.hooks.append(guard)
    wrapped = base64.encodebytes(b"me:hidden").decode() + "\r\n"
    await works(images, server, Auth(auth=wrapped))


@pytest.mark.parametrize("media", [made.OCI, made.DOCKER])
@pytest.mark.parametrize("suffix", ["", ".gzip", "+zstd"])
async def test_types_that_say_something_else_than_the_content(
    images: Images, server: Server, media: made.MediaTypes, suffix: str
) -> None:
    """The content tells how a layer is compressed; the type of a config, and fields that are unknown, do not matter."""
    layer_type = media.layer.removesuffix("+gzip").removesuffix(".gzip") + suffix
    media = made.MediaTypes(media.index, media.manifest, "application/x-config", layer_type)
    sample = made.Image("test/image", ("1",), SAMPLE.layers, media=media, indexed=False)
    server.add(sample)
    await images.pull(f"{server.host}/test/image:1")


async def test_the_image_file_system_is_known_at_the_first_look(
    place: Place, server: Server
) -> None:
    """The kubelet asks when it connects: where the images are, to find the capacity, and what they take."""
    async with place.open() as images:
        empty = await images.usage()
        assert empty.mountpoint == str(place.root)
        assert place.root.is_dir()
        await works(images, server)
        before = await images.usage()
        assert before.used_bytes > empty.used_bytes
        assert before.inodes_used > empty.inodes_used
    async with place.open() as images:
        assert await images.usage() == before
