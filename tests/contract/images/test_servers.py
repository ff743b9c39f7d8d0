"""Servers that stall, lie, break off and ask for secrets that are not theirs."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import socket
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from nodeagent.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    RegistryUnavailable,
    Unsupported,
)
from nodeagent.images import manifest
from nodeagent.images.catalog import Auth, Images
from nodeagent.images.remote import client, source, throttling
from tests.support import images as made
from tests.support import tars
from tests.support.fake_registry import Handler, Server, image, layer, send_part, serving
from tests.support.places import Place

RANDOM = random.Random(1).randbytes(600_000)
SAMPLE = image(layer(tars.file("a", RANDOM)), layer(tars.file("b")))
BIG = tars.digest(SAMPLE.layers[0].blob)
USER = Auth(username="me", password="secret")
BASIC = "Basic " + base64.b64encode(b"me:secret").decode()


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "SILENCE_SECONDS", 0.4)
    monkeypatch.setattr(client, "FLOOR_WINDOW_SECONDS", 0.2)
    monkeypatch.setattr(source, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(throttling, "FIRST_SECONDS", 0.01)


def mirrored(place: Place, mirror: Server, server: Server, extra: str = "") -> str:
    """A name whose pulls go to the mirror first."""
    place.hosts(server.host, f'[host."{mirror.url}"]\n{extra}')
    return f"{server.host}/test/image:1"


def refusing(status: int, part: str) -> Handler:
    async def hook(request: web.Request) -> web.Response | None:
        return web.Response(status=status) if part in request.path else None

    return hook


# --- interruption ---


async def test_a_blob_is_resumed_where_it_broke_off(images: Images, server: Server) -> None:
    server.add(SAMPLE)

    async def break_off(request: web.Request) -> web.StreamResponse | None:
        if BIG not in request.path or len(server.asked(BIG)) > 2:
            return None
        assert request.transport is not None
        data = SAMPLE.layers[0].blob[request.http_range.start or 0 :]
        if len(server.asked(BIG)) == 1:
            await send_part(request, data, 200_000)
            request.transport.close()
        return web.Response(status=503)

    server.hooks.append(break_off)
    pulled = await images.pull(f"{server.host}/test/image:1")
    assert (images.lower_dirs(pulled)[1] / "a").read_bytes() == RANDOM
    starts = [request.http_range.start or 0 for request in server.asked(BIG)]
    assert starts[0] == 0
    assert starts[1] == starts[2] > 0


async def test_a_server_without_ranges(images: Images, server: Server) -> None:
    server.add(SAMPLE)
    blob = SAMPLE.layers[0].blob

    async def break_off(request: web.Request) -> web.StreamResponse | None:
        if BIG not in request.path:
            return None
        if len(server.asked(BIG)) == 1:
            assert request.transport is not None
            await send_part(request, blob, 200_000)
            request.transport.close()
        return web.Response(body=blob)

    server.hooks.append(break_off)
    await images.pull(f"{server.host}/test/image:1")
    assert images.counters.fetched_bytes == sum(len(layer.blob) for layer in SAMPLE.layers)


async def test_another_range_than_asked_for(images: Images, server: Server) -> None:
    server.add(SAMPLE)
    blob = SAMPLE.layers[0].blob

    async def confuse(request: web.Request) -> web.StreamResponse | None:
        if BIG not in request.path:
            return None
        if not request.http_range.start:
            assert request.transport is not None
            await send_part(request, blob, 200_000)
            request.transport.close()
        headers = {"Content-Range": f"bytes 5-{len(blob) - 1}/{len(blob)}"}
        return web.Response(status=206, body=blob[5:], headers=headers)

    server.hooks.append(confuse)
    with pytest.raises(RegistryUnavailable, match="another range"):
        await images.pull(f"{server.host}/test/image:1")


async def test_a_server_that_always_breaks_off_is_given_up(images: Images, server: Server) -> None:
    server.add(SAMPLE)
    server.hooks.append(refusing(500, "/blobs/" + BIG))
    with pytest.raises(RegistryUnavailable, match=r"^RegistryUnavailable: image .*: 500"):
        await images.pull(f"{server.host}/test/image:1")
    assert len(server.asked(BIG)) == source.ROUNDS


@pytest.mark.parametrize("status", [0, 429, 503])
async def test_every_question_is_asked_again(images: Images, server: Server, status: int) -> None:
    server.add(SAMPLE)
    Guard(server, "Bearer the-token", bearer(server))
    token_service(server)
    failed = set()

    async def fail_once(request: web.Request) -> web.StreamResponse | None:
        if request.path in failed:
            return None
        failed.add(request.path)
        if not status:
            assert request.transport is not None
            request.transport.close()
        return web.Response(status=status or 200)

    server.hooks.insert(0, fail_once)
    await images.pull(f"{server.host}/test/image:1")
    assert "/token" in failed
    server.hooks.insert(0, refusing(status or 500, "/manifests/"))
    before = len(server.requests)
    with pytest.raises(RegistryUnavailable):
        await images.pull(f"{server.host}/test/image:1")
    tries = source.REFUSALS if status == 429 else source.ROUNDS
    assert len(server.requests) - before == tries


# --- mirrors ---


@pytest.mark.parametrize("bytes_a_second", [0, 500])
async def test_a_stalled_mirror_is_left(
    place: Place, servers: tuple[Server, Server], bytes_a_second: int
) -> None:
    mirror, server = servers
    mirror.add(SAMPLE)
    server.add(SAMPLE)

    async def trickle(request: web.Request) -> web.StreamResponse | None:
        if BIG not in request.path:
            return None
        data = SAMPLE.layers[0].blob
        response = await send_part(request, data, 100_000)
        for at in range(100_000, 200_000):
            await asyncio.sleep(1 / bytes_a_second if bytes_a_second else 60)
            await response.write(data[at : at + 1])
        return response

    mirror.hooks.append(trickle)
    name = mirrored(place, mirror, server)
    async with place.open() as images, asyncio.timeout(60):
        await images.pull(name)
    (resumed,) = server.asked(BIG)
    assert (resumed.http_range.start or 0) >= 100_000
    assert not server.asked("/manifests/")


async def test_a_mirror_that_does_not_answer(place: Place, server: Server) -> None:
    server.add(SAMPLE)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        place.hosts(server.host, f'[host."http://127.0.0.1:{port}"]\n[host."http://127.0.0.1:1"]')
        async with place.open() as images, asyncio.timeout(60):
            await images.pull(f"{server.host}/test/image:1")


async def test_a_mirror_is_told_for_whom_it_stands_in(
    place: Place, servers: tuple[Server, Server]
) -> None:
    mirror, server = servers
    mirror.add(SAMPLE)
    name = mirrored(place, mirror, server)
    async with place.open() as images:
        await images.pull(name)
    assert {request.query["ns"] for request in mirror.requests} == {server.host}
    assert server.requests == []


async def test_a_mirror_without_the_image(place: Place, servers: tuple[Server, Server]) -> None:
    mirror, server = servers
    server.add(SAMPLE)
    name = mirrored(place, mirror, server)
    async with place.open() as images:
        await images.pull(name)
        with pytest.raises(NotFound, match=f"{mirror.host}.*{server.host}.*404"):
            await images.pull(name + "0")


async def test_a_mirror_that_may_not_resolve(place: Place, servers: tuple[Server, Server]) -> None:
    mirror, server = servers
    top = mirror.add(SAMPLE)
    server.add(SAMPLE)
    name = mirrored(place, mirror, server, 'capabilities = ["pull"]')
    async with place.open() as images:
        await images.pull(name)
        assert not mirror.asked("/manifests/")
        assert not server.asked("/blobs/")
        await images.pull(f"{server.host}/test/image@{top}")
        assert mirror.asked(top)


async def test_a_mirror_with_wrong_content(place: Place, servers: tuple[Server, Server]) -> None:
    mirror, server = servers
    mirror.add(SAMPLE)
    server.add(SAMPLE)
    path = f"/v2/test/image/blobs/{BIG}"
    wrong = bytes(len(SAMPLE.layers[0].blob))
    mirror.contents[path] = wrong, ""
    name = mirrored(place, mirror, server)
    async with place.open() as images:
        pulled = await images.pull(name)
        assert (images.lower_dirs(pulled)[1] / "a").read_bytes() == RANDOM
        await images.remove(name)
        server.contents[path] = wrong, ""
        with pytest.raises(DataLoss, match=BIG):
            await images.pull(name)
    assert place.left("layers", "staging", "blobs/sha256") == []


@pytest.mark.parametrize("length", [-1, 0, 1])
async def test_a_mirror_with_a_wrong_config(
    place: Place, servers: tuple[Server, Server], length: int
) -> None:
    mirror, server = servers
    mirror.add(SAMPLE)
    server.add(SAMPLE)
    config = SAMPLE._config("amd64")
    path = f"/v2/test/image/blobs/{made.digest(config)}"
    mirror.contents[path] = bytes(len(config) + length), ""
    name = mirrored(place, mirror, server)
    async with place.open() as images:
        await images.pull(name)
        await images.remove(name)
        server.contents[path] = bytes(len(config)), ""
        with pytest.raises(DataLoss, match=made.digest(config)):
            await images.pull(name)


async def test_a_proxy_as_configured(place: Place, server: Server) -> None:
    server.add(SAMPLE)
    place.hosts("a.b", f'server = "http://registry.invalid"\nproxy = "{server.url}"')
    async with place.open() as images:
        await images.pull("a.b/test/image:1")
    assert {request.headers["Host"] for request in server.requests} == {"registry.invalid"}


async def test_a_proxy_of_the_environment(
    place: Place, servers: tuple[Server, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, server = servers
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, proxy.url)
    monkeypatch.delenv("no_proxy", raising=False)
    for one in servers:
        one.add(SAMPLE)
    place.hosts("a.b", 'server = "http://registry.invalid"')
    async with place.open() as images:
        await images.pull("a.b/test/image:1")
        await images.remove("a.b/test/image:1")
        asked = len(proxy.requests)
        await images.pull(f"{server.host}/test/image:1")
    assert len(proxy.requests) == asked > 0


@pytest.fixture
async def refusing_proxy() -> AsyncIterator[tuple[str, list[bytes]]]:
    """Its address, and the heads of the requests that it refuses: no proxy is a server of the usual kind."""
    heads: list[bytes] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 407 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as listening:
        host, port = listening.sockets[0].getsockname()
        yield f"{host}:{port}", heads


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_proxy_gets_its_own_secret(
    place: Place,
    refusing_proxy: tuple[str, list[bytes]],
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
) -> None:
    address, heads = refusing_proxy
    monkeypatch.setenv(f"{scheme.upper()}_PROXY", f"http://me:se%63ret@{address}")
    place.hosts("a.b", f'server = "{scheme}://registry.invalid"')
    async with place.open() as images:
        with pytest.raises(RegistryUnavailable, match="407") as caught:
            await images.pull("a.b/test/image:1", Auth(username="other", password="hidden"))
    assert f"Proxy-Authorization: {BASIC}".encode() in heads[0]
    assert heads[0].startswith({"http": b"GET http://", "https": b"CONNECT "}[scheme])
    assert b"\r\nAuthorization" not in heads[0]
    assert "se%63ret" not in str(caught.value)


async def test_a_server_that_needs_no_proxy(
    place: Place, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("HTTP_PROXY", server.url)
    monkeypatch.setenv("NO_PROXY", "10.0.0.0/8,registry.invalid:80,.svc")
    server.add(SAMPLE)
    place.hosts("a.b", 'server = "http://registry.invalid"')
    async with place.open() as images:
        with pytest.raises(RegistryUnavailable, match=r"registry\.invalid"):
            await images.pull("a.b/test/image:1")
    assert not server.requests


async def test_a_proxy_that_cannot_be_used_is_named(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "socks5://me:secret@127.0.0.1:1080")
    async with place.open() as images:
        with pytest.raises(
            RegistryUnavailable, match=r"HTTPS_PROXY is a socks5 .*NO_PROXY"
        ) as caught:
            await images.pull("registry.invalid/test/image:1")
    assert "secret" not in str(caught.value)


async def test_no_host_at_all(place: Place, server: Server) -> None:
    place.hosts(server.host, 'capabilities = ["push"]')
    async with place.open() as images:
        with pytest.raises(FailedPrecondition, match=r"hosts\.toml"):
            await images.pull(f"{server.host}/test/image:1")


async def test_mistakes_in_hosts_files_are_told(place: Place) -> None:
    place.hosts("a.b", "server = 1")
    async with place.open() as images:
        with pytest.raises(InvalidArgument, match=r"a\.b/hosts\.toml.*server"):
            await images.pull("a.b/c")
        place.hosts("a.b", 'ca = "none.pem"')
        with pytest.raises(InvalidArgument, match=r"none\.pem"):
            await images.pull("a.b/c")


# --- wrong content ---


async def test_blobs_of_another_length(images: Images, server: Server) -> None:
    server.add(SAMPLE)
    path = f"/v2/test/image/blobs/{BIG}"
    for data in (SAMPLE.layers[0].blob + b"more", bytes(10)):
        server.contents[path] = data, ""
        with pytest.raises((DataLoss, RegistryUnavailable), match=BIG):
            await images.pull(f"{server.host}/test/image:1")
    assert images.list() == []


async def test_manifests_by_digest_are_verified(images: Images, server: Server) -> None:
    top = server.add(SAMPLE)
    other = image(layer(tars.file("other"))).top()
    server.contents[f"/v2/test/image/manifests/{top}"] = other
    with pytest.raises(DataLoss, match=top):
        await images.pull(f"{server.host}/test/image@{top}")


async def test_configs_are_verified(images: Images, server: Server) -> None:
    server.add(SAMPLE)
    config = made.digest(SAMPLE._config("amd64"))
    server.contents[f"/v2/test/image/blobs/{config}"] = b"{}", ""
    with pytest.raises((DataLoss, RegistryUnavailable), match=config):
        await images.pull(f"{server.host}/test/image:1")


async def test_a_config_without_end(images: Images, server: Server) -> None:
    server.add(SAMPLE)
    config = made.digest(SAMPLE._config("amd64"))
    sent = 0

    async def go_on(request: web.Request) -> web.StreamResponse | None:
        nonlocal sent
        if config not in request.path:
            return None
        response = web.StreamResponse()
        await response.prepare(request)
        while sent < 256 << 20:
            await response.write(bytes(1 << 20))
            sent += 1 << 20
        return response

    server.hooks.append(go_on)
    with pytest.raises(DataLoss, match=f"{config}: longer"):
        await images.pull(f"{server.host}/test/image:1")
    assert sent < 64 << 20


@pytest.mark.parametrize(
    ("document", "media_type", "error"),
    [
        (b"", "", InvalidArgument),
        (b"<html>", "text/html", InvalidArgument),
        (b"{}", manifest.OCI_MANIFEST, InvalidArgument),
        (b'{"schemaVersion":1}', manifest._SCHEMA_1 + "json", Unsupported),
        (b" " * (5 << 20), "", InvalidArgument),
        (b'{"manifests":[]}', manifest.OCI_INDEX, NotFound),
    ],
)
async def test_manifests_that_are_none(
    images: Images, server: Server, document: bytes, media_type: str, error: type[Exception]
) -> None:
    server.contents["/v2/test/image/manifests/1"] = document, media_type
    with pytest.raises(error, match=f'image "{server.host}/test/image:1"'):
        await images.pull(f"{server.host}/test/image:1")


async def test_indexes_in_indexes_end(images: Images, server: Server) -> None:
    data, digest = b"", ""
    for _ in range(5):
        entry = {"mediaType": manifest.OCI_INDEX, "digest": digest or tars.digest(b""), "size": 1}
        data = made.encode({"schemaVersion": 2, "manifests": [entry]})
        digest = tars.digest(data)
        server.contents[f"/v2/test/image/manifests/{digest}"] = data, manifest.OCI_INDEX
    with pytest.raises(InvalidArgument, match="indexes in indexes"):
        await images.pull(f"{server.host}/test/image@{digest}")


async def test_foreign_layers(place: Place, servers: tuple[Server, Server]) -> None:
    elsewhere, server = servers
    blob = SAMPLE.layers[0].blob
    elsewhere.contents["/some/where"] = blob, ""
    top = json.loads(SAMPLE.top()[0])
    top["layers"][0]["mediaType"] = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
    top["layers"][0]["urls"] = ["file:///etc/passwd", f"{elsewhere.url}/some/where?a=b%2Fc"]
    server.add(SAMPLE)
    del server.contents[f"/v2/test/image/blobs/{BIG}"]
    server.contents["/v2/test/image/manifests/1"] = made.encode(top), SAMPLE.media.manifest
    async with place.open() as images:
        pulled = await images.pull(f"{server.host}/test/image:1", USER)
        assert (images.lower_dirs(pulled)[1] / "a").read_bytes() == RANDOM
    (request,) = elsewhere.requests
    assert request.raw_path == "/some/where?a=b%2Fc"
    assert "Authorization" not in request.headers


# --- secrets ---


class Guard:
    """A registry's door: wants `expected`, and says where to get it."""

    def __init__(self, server: Server, expected: str, challenge: str) -> None:
        self.expected = expected
        self.challenge = challenge
        server.hooks.append(self.handle)

    async def handle(self, request: web.Request) -> web.StreamResponse | None:
        if request.path == "/token" or request.headers.get("Authorization") == self.expected:
            return None
        return web.Response(status=401, headers={"WWW-Authenticate": self.challenge})


def token_service(server: Server, token: str = "the-token") -> list[dict[str, str]]:
    """Answers /token; returns what it was asked, as it is asked."""
    asked: list[dict[str, str]] = []

    async def answer(request: web.Request) -> web.StreamResponse | None:
        if request.path != "/token":
            return None
        form = {key: str(value) for key, value in (await request.post()).items()}
        said = {"method": request.method, "auth": request.headers.get("Authorization", "")}
        asked.append({**said, **request.query, **form})
        return web.json_response({"token": token, "expires_in": 60})

    server.hooks.append(answer)
    return asked


def bearer(realm: Server) -> str:
    return f'Bearer realm="{realm.url}/token",service="the registry",scope="repository:test/image:pull"'


async def test_a_token_is_asked_for_once(place: Place, servers: tuple[Server, Server]) -> None:
    service, server = servers
    server.add(SAMPLE)
    Guard(server, "Bearer the-token", bearer(service))
    asked = token_service(service)
    async with place.open() as images:
        await images.pull(f"{server.host}/test/image:1", USER)
    assert asked == [
        {
            "method": "GET",
            "auth": BASIC,
            "scope": "repository:test/image:pull",
            "service": "the registry",
            "account": "me",
        }
    ]
    assert BASIC not in {request.headers.get("Authorization") for request in server.requests}


async def test_a_token_for_anybody(images: Images, server: Server) -> None:
    server.add(SAMPLE)
    Guard(server, "Bearer the-token", bearer(server))
    asked = token_service(server)
    await images.pull(f"{server.host}/test/image:1")
    assert asked[0]["auth"] == ""


async def test_a_refresh_token(images: Images, server: Server) -> None:
    server.add(SAMPLE)
    Guard(server, "Bearer the-token", bearer(server))
    asked = token_service(server)
    await images.pull(f"{server.host}/test/image:1", Auth(identity_token="refresh"))
    assert asked[0]["method"] == "POST"
    assert asked[0]["grant_type"] == "refresh_token"
    assert asked[0]["refresh_token"] == "refresh"


async def test_a_token_of_the_caller(images: Images, server: Server) -> None:
    server.add(SAMPLE)
    Guard(server, "Bearer mine", bearer(server))
    await images.pull(f"{server.host}/test/image:1", Auth(registry_token="mine"))
    assert not server.asked("/token")


async def test_a_token_that_expires_is_renewed(images: Images, server: Server) -> None:
    server.add(SAMPLE)
    guard = Guard(server, "Bearer the-token", bearer(server))
    asked = token_service(server)

    async def expire(request: web.Request) -> web.StreamResponse | None:
        if BIG in request.path and len(asked) == 1:
            guard.expected = "Bearer none"
        if request.path == "/token" and len(asked) == 1:
            guard.expected = "Bearer the-token"
        return None

    server.hooks.insert(0, expire)
    await images.pull(f"{server.host}/test/image:1")
    assert len(asked) >= 2


async def test_a_token_service_that_refuses(images: Images, server: Server) -> None:
    server.add(SAMPLE)
    Guard(server, "Bearer the-token", bearer(server))
    server.hooks.append(refusing(401, "/token"))
    with pytest.raises(PermissionDenied) as caught:
        await images.pull(f"{server.host}/test/image:1", USER)
    assert "secret" not in str(caught.value)
    assert BASIC not in str(caught.value)


async def test_a_mirror_gets_no_secret(place: Place, servers: tuple[Server, Server]) -> None:
    mirror, server = servers
    mirror.add(SAMPLE)
    server.add(SAMPLE)
    Guard(mirror, BASIC, 'Basic realm="give it to me"')
    Guard(server, BASIC, 'Basic realm="r"')
    name = mirrored(place, mirror, server)
    async with place.open() as images:
        await images.pull(name, USER)
    assert all("Authorization" not in request.headers for request in mirror.requests)
    assert mirror.requests


async def test_redirects_lose_all_secrets(place: Place, servers: tuple[Server, Server]) -> None:
    """CVE-2020-15157: a blob's place elsewhere asks for credentials."""
    storage, server = servers
    server.add(SAMPLE)
    Guard(server, BASIC, 'Basic realm="r"')
    storage.contents[f"/{BIG}"] = SAMPLE.layers[0].blob, ""

    async def redirect(request: web.Request) -> web.StreamResponse | None:
        if BIG not in request.path:
            return None
        return web.Response(
            status=307, headers={"Location": f"{storage.url}/{BIG}?signature=a%2Fb%3D"}
        )

    server.hooks.append(redirect)
    place.hosts(server.host, f'server = "{server.url}"\n[header]\nx-secret = "hidden"')
    async with place.open() as images:
        await images.pull(f"{server.host}/test/image:1", USER)
        await images.remove(f"{server.host}/test/image:1")
        (request,) = storage.requests
        assert request.raw_path.endswith("?signature=a%2Fb%3D")
        assert not {"Authorization", "X-Secret"} & request.headers.keys()
        assert all(request.headers["X-Secret"] == "hidden" for request in server.requests)

        Guard(storage, "none", 'Basic realm="give it to me"')
        with pytest.raises(RegistryUnavailable) as caught:
            await images.pull(f"{server.host}/test/image:1", USER)
        assert "signature" not in str(caught.value)
    assert all("Authorization" not in request.headers for request in storage.requests)
    assert not storage.asked("/token")


@pytest.mark.parametrize("location", ["file:///etc/passwd", "//", "http://u:p@h/", "gopher://a/"])
async def test_redirects_to_nowhere(images: Images, server: Server, location: str) -> None:
    server.add(SAMPLE)

    async def redirect(request: web.Request) -> web.StreamResponse | None:
        return web.Response(status=302, headers={"Location": location})

    server.hooks.append(redirect)
    with pytest.raises(RegistryUnavailable):
        await images.pull(f"{server.host}/test/image:1")


async def test_redirects_in_circles(images: Images, server: Server) -> None:
    async def redirect(request: web.Request) -> web.StreamResponse | None:
        return web.Response(status=302, headers={"Location": request.path})

    server.hooks.append(redirect)
    with pytest.raises(RegistryUnavailable, match="redirects"):
        await images.pull(f"{server.host}/test/image:1")


# --- TLS ---


@pytest.fixture
async def tls_server(certificate: Path) -> AsyncIterator[Server]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.load_verify_locations(certificate)
    context.verify_mode = ssl.CERT_OPTIONAL
    async with serving(context) as started:
        started.add(SAMPLE)
        yield started


async def test_an_unknown_certificate_is_refused(place: Place, tls_server: Server) -> None:
    place.hosts(tls_server.host, f'server = "{tls_server.url}"')
    async with place.open() as images:
        with pytest.raises(RegistryUnavailable, match="certificate"):
            await images.pull(f"{tls_server.host}/test/image:1", USER)
    assert tls_server.requests == []


async def test_certificates_as_configured(
    place: Place, tls_server: Server, certificate: Path
) -> None:
    for text in (f'ca = "{certificate}"\nclient = "{certificate}"', "skip_verify = true"):
        place.hosts(tls_server.host, f'server = "{tls_server.url}"\n{text}')
        async with place.open() as images:
            await images.pull(f"{tls_server.host}/test/image:1")


async def test_no_way_from_https_to_http(
    place: Place, tls_server: Server, server: Server, certificate: Path
) -> None:
    async def redirect(request: web.Request) -> web.StreamResponse | None:
        return web.Response(status=307, headers={"Location": f"{server.url}{request.path}"})

    tls_server.hooks.append(redirect)
    server.add(SAMPLE)
    place.hosts(tls_server.host, f'server = "{tls_server.url}"\nca = "{certificate}"')
    async with place.open() as images:
        with pytest.raises(RegistryUnavailable, match="plain HTTP"):
            await images.pull(f"{tls_server.host}/test/image:1")
    assert server.requests == []


async def test_a_plain_token_service_of_a_tls_registry(
    place: Place, tls_server: Server, server: Server, certificate: Path
) -> None:
    Guard(tls_server, "Bearer the-token", bearer(server))
    asked = token_service(server)
    place.hosts(tls_server.host, f'server = "{tls_server.url}"\nca = "{certificate}"')
    async with place.open() as images:
        with pytest.raises(PermissionDenied, match="no token service"):
            await images.pull(f"{tls_server.host}/test/image:1", USER)
    assert asked == []


# --- sharing ---


@pytest.mark.parametrize("below", [(), (layer(tars.file("below")),)])
async def test_a_shared_failure_is_not_the_others_failure(
    place: Place, servers: tuple[Server, Server], below: tuple[made.Layer, ...]
) -> None:
    """What two images share, a layer or only its blob, breaks for the one that began to fetch it."""
    bad, good = servers
    bad.add(SAMPLE)
    good.add(image(*below, *SAMPLE.layers))

    async def stall(request: web.Request) -> web.StreamResponse | None:
        if BIG not in request.path:
            return None
        await asyncio.sleep(0.2)
        return web.Response(status=403)

    bad.hooks.append(stall)
    async with place.open() as images:
        first = asyncio.create_task(images.pull(f"{bad.host}/test/image:1"))
        await asyncio.sleep(0.1)
        second = asyncio.create_task(images.pull(f"{good.host}/test/image:1"))
        with pytest.raises(PermissionDenied):
            await first
        assert (await second).repo_tags == (f"{good.host}/test/image:1",)


async def test_the_loop_is_not_held(images: Images, server: Server) -> None:
    server.add(image(layer(*(tars.file(f"{n}", RANDOM[:20_000]) for n in range(2_000)))))
    worst, done = 0.0, False

    async def watch() -> None:
        nonlocal worst
        while not done:
            before = time.perf_counter()
            await asyncio.sleep(0)
            worst = max(worst, time.perf_counter() - before)

    async with asyncio.TaskGroup() as group:
        group.create_task(watch())
        began = time.perf_counter()
        await images.pull(f"{server.host}/test/image:1")
        took = time.perf_counter() - began
        done = True
    assert worst < took / 3
