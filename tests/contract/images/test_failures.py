"""What the owner of a pod reads about a pull that failed: the registry, the repository, and what to do."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

import pytest
from aiohttp import web

from nodeagent.errors import NodeAgentError, NotFound, PermissionDenied, RegistryUnavailable
from nodeagent.images.catalog import Auth, Images
from nodeagent.images.remote import client, source
from nodeagent.images.remote.dns import Resolver
from tests.support import tars
from tests.support.fake_registry import Server, image, layer, serving
from tests.support.places import Place

SAMPLE = image(layer(tars.file("a")))
USER = Auth(username="me", password="hidden")


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SILENCE_SECONDS", 0.4)
    monkeypatch.setattr(source, "FIRST_PAUSE_SECONDS", 0.01)


async def failure(images: Images, name: str, auth: Auth | None = None) -> str:
    """The text of a pull's error, which names the image."""
    with pytest.raises(NodeAgentError) as caught:
        await images.pull(name, auth)
    text = str(caught.value)
    assert f'image "{name}": ' in text
    assert text.startswith("RegistryUnavailable: ") == isinstance(caught.value, RegistryUnavailable)
    assert "hidden" not in text
    return text


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (socket.EAI_NONAME, "no such host registry.invalid; look at how it is spelt"),
        (socket.EAI_AGAIN, "the name registry.invalid cannot be looked up: Temporary failure"),
    ],
)
async def test_a_name_that_is_none(
    images: Images, monkeypatch: pytest.MonkeyPatch, error: int, said: str
) -> None:
    async def fail(*_: object, **_family: object) -> None:
        raise socket.gaierror(error, {socket.EAI_AGAIN: "Temporary failure"}.get(error, "unknown"))

    monkeypatch.setattr(Resolver, "resolve", fail)
    text = await failure(images, "registry.invalid/a/b:1")
    assert f"https://registry.invalid/v2/a/b/manifests/1: {said}" in text


async def test_nobody_listens(images: Images) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    text = await failure(images, f"127.0.0.1:{port}/a/b:1")
    assert (
        f"http://127.0.0.1:{port}/v2/a/b/manifests/1: connection refused; is the registry" in text
    )


async def test_no_such_tag(images: Images, server: Server) -> None:
    text = await failure(images, f"{server.host}/a/b:1")
    assert "/v2/a/b/manifests/1: 404: unknown no; look at the image's name and tag" in text


async def test_a_part_of_the_image_is_gone(images: Images, server: Server) -> None:
    server.add(SAMPLE)
    blob = tars.digest(SAMPLE.layers[0].blob)
    del server.contents[f"/v2/test/image/blobs/{blob}"]
    text = await failure(images, f"{server.host}/test/image:1")
    assert f"{blob}: 404: unknown no; a part of the image is not there any more" in text


@pytest.mark.parametrize("status", [401, 403])
async def test_access_is_denied(images: Images, server: Server, status: int) -> None:
    async def deny(request: web.Request) -> web.Response:
        body = {"errors": [{"code": "DENIED", "message": "not yours"}]}
        return web.json_response(
            body, status=status, headers={"WWW-Authenticate": 'Basic realm="r"'}
        )

    server.hooks.append(deny)
    name = f"{server.host}/a/b:1"
    said = (
        f"/v2/a/b/manifests/1: {status}: denied not yours: access denied, or no such repository; "
    )
    text = await failure(images, name)
    assert f"{said}no credentials were given for {server.host}: a private image needs a" in text
    text = await failure(images, name, USER)
    assert f"{said}the credentials for {server.host} do not allow it" in text
    with pytest.raises(PermissionDenied):
        await images.pull(name)


async def test_a_token_service_denies(
    images: Images, server: Server, servers: tuple[Server, Server]
) -> None:
    async def challenge(request: web.Request) -> web.Response:
        bearer = f'Bearer realm="{servers[0].url}/token"'
        return web.Response(status=401, headers={"WWW-Authenticate": bearer})

    server.hooks.append(challenge)
    servers[0].hooks.append(challenge)
    text = await failure(images, f"{server.host}/a/b:1", USER)
    assert f"has its token service at {servers[0].url}: access denied" in text
    assert f"the credentials for {server.host} do not allow it" in text


async def test_a_mirror_is_asked_without_credentials(
    place: Place, servers: tuple[Server, Server]
) -> None:
    mirror, server = servers

    async def deny(request: web.Request) -> web.Response:
        return web.Response(status=403)

    mirror.hooks.append(deny)
    place.hosts(server.host, f'[host."{mirror.url}"]')
    async with place.open() as images:
        text = await failure(images, f"{server.host}/a/b:1", USER)
        assert f"{mirror.url}/v2/a/b/manifests/1?" not in text
        assert "403: access denied, or no such repository; a mirror is asked without cred" in text
        with pytest.raises(NotFound):
            await images.pull(f"{server.host}/a/b:1")


async def test_plain_http_instead_of_tls(place: Place, server: Server) -> None:
    place.hosts("a.b", f'server = "https://{server.host}"')
    async with place.open() as images:
        text = await failure(images, "a.b/a/b:1")
    assert (
        f'does not speak TLS; if plain HTTP is meant, write server = "http://{server.host}"' in text
    )


async def test_an_unknown_authority(place: Place, tls: ssl.SSLContext) -> None:
    async with serving(tls) as server, place.open() as images:
        place.hosts("a.b", f'server = "{server.url}"')
        text = await failure(images, "a.b/a/b:1")
        assert (
            "its certificate is not trusted (self-signed certificate); give its authority" in text
        )
        place.hosts("a.b", f'server = "http://{server.host}"')
        assert "closed the connection without an answer" in await failure(images, "a.b/a/b:1")


@pytest.fixture
def tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context
