"""Registries that want the agent to ask servers which they cannot reach themselves, and to tell what these say.

All of it happens in a network namespace whose loopback interface has the addresses of an internet, of a private network
and of a cloud's metadata service.
"""

from __future__ import annotations

import json
import re
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from nodeagent.errors import NodeAgentError, PermissionDenied, RegistryUnavailable
from nodeagent.images.catalog import Auth, Images, Limits
from nodeagent.images.remote import source
from nodeagent.linux import syscalls
from tests.kernel.net.world import Namespace
from tests.support import images as made
from tests.support import tars
from tests.support.fake_registry import Server, image, layer, serving
from tests.support.places import Place

PUBLIC, ELSEWHERE = "203.0.113.1", "203.0.113.2"
PRIVATE, STORAGE = "10.1.2.3", "10.1.2.4"
METADATA = "169.254.169.254"
INNER_TEXT = "INNER-TEXT"

SAMPLE = image(layer(tars.file("a", b"a" * 1000)))
BLOB = SAMPLE.layers[0].blob
DIGEST = tars.digest(BLOB)
USER = Auth(username="me", password="secret")

Names = dict[str, list[str]]
Lead = Callable[[Server, str], None]


@pytest.fixture(autouse=True)
async def internet() -> AsyncIterator[None]:
    """This thread is in a network of its own, in which everything is on loopback."""
    with Namespace.current() as machine, Namespace.new() as namespace:
        syscalls.setns(namespace.descriptor, syscalls.CLONE_NEWNET)
        try:
            async with namespace.routing() as ipr:
                await ipr.link("set", index=1, state="up")
                for address in (PUBLIC, ELSEWHERE, PRIVATE, STORAGE, METADATA):
                    await ipr.addr("add", index=1, address=address, prefixlen=32)
            yield
        finally:
            syscalls.setns(machine.descriptor, syscalls.CLONE_NEWNET)


@pytest.fixture(autouse=True)
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "FIRST_PAUSE_SECONDS", 0.01)
    for name in ("http_proxy", "https_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """A name's addresses, one list for all its lookups; beside them the resolver is the real one."""
    known: Names = {}
    resolve = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, *more: Any, **options: Any) -> list[Any]:
        options.pop("family", None)
        return [
            answer
            for address in known.get(host, [host])
            for answer in resolve(address, port, *more, **options)
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return known


@pytest.fixture
async def serve() -> AsyncIterator[Callable[..., Any]]:
    async with AsyncExitStack() as stack:

        async def start(address: str, tls: ssl.SSLContext | None = None) -> Server:
            return await stack.enter_async_context(serving(tls, address=address))

        yield start


@pytest.fixture
async def public(serve: Callable[..., Any], place: Place) -> Server:
    """A registry of the internet, with the sample."""
    return await registry_at(serve, place, PUBLIC)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
async def images(place: Place) -> AsyncIterator[Images]:
    async with place.open() as opened:
        yield opened


async def registry_at(serve: Callable[..., Any], place: Place, address: str) -> Server:
    server: Server = await serve(address)
    server.add(SAMPLE)
    place.hosts(server.host, f'server = "{server.url}"')
    return server


async def inner_service(serve: Callable[..., Any], address: str = "0.0.0.0") -> Server:
    """Answers everything with the layer that is wanted, or with a token: it would do."""
    server: Server = await serve(address)

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path == "/token":
            return web.json_response({"token": "inner"})
        return web.Response(body=BLOB)

    server.hooks.append(answer)
    return server


def port_of(server: Server) -> str:
    return server.host.rpartition(":")[2]


# --- ways to lead somewhere ---


def redirect_of(part: str) -> Lead:
    def lead(server: Server, target: str) -> None:
        async def hook(request: web.Request) -> web.StreamResponse | None:
            if part not in request.path:
                return None
            return web.Response(status=307, headers={"Location": f"{target}/x?secret"})

        server.hooks.insert(0, hook)

    return lead


def token_service(server: Server, target: str) -> None:
    async def hook(request: web.Request) -> web.StreamResponse | None:
        if "Authorization" in request.headers:
            return None
        challenge = f'Bearer realm="{target}/token",service="s"'
        return web.Response(status=401, headers={"WWW-Authenticate": challenge})

    server.hooks.insert(0, hook)


def layer_url(server: Server, target: str) -> None:
    top = json.loads(SAMPLE.top()[0])
    top["layers"][0]["urls"] = [f"{target}/x"]
    server.contents["/v2/test/image/manifests/1"] = made.encode(top), SAMPLE.media.manifest
    server.contents.pop(f"/v2/test/image/blobs/{DIGEST}", None)


LEADS = [
    pytest.param(redirect_of(DIGEST), id="blob"),
    pytest.param(redirect_of("/manifests/"), id="manifest"),
    pytest.param(token_service, id="token"),
    pytest.param(layer_url, id="url"),
]


async def error_of(images: Images, server: Server, auth: Auth | None = None) -> NodeAgentError:
    with pytest.raises(NodeAgentError) as caught:
        await images.pull(f"{server.host}/test/image:1", auth)
    text = str(caught.value)
    assert INNER_TEXT not in text
    assert "secret" not in text
    return caught.value


# --- addresses of the node ---


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("host", ["127.0.0.1", METADATA, "inner.example"])
async def test_no_way_to_the_node(
    images: Images, public: Server, serve: Callable[..., Any], names: Names, lead: Lead, host: str
) -> None:
    names["inner.example"] = ["127.0.0.1"]
    inner = await inner_service(serve)
    lead(public, f"http://{host}:{port_of(inner)}")
    error = await error_of(images, public, USER)
    assert inner.requests == []
    assert isinstance(error, PermissionDenied) or lead is layer_url  # then the registry is asked
    assert "refused" in str(error)


@pytest.mark.parametrize(
    "host",
    [
        "0.0.0.0",
        "0",
        "127.1",
        "127.9.9.9",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0177.0.0.1",
        "localhost",
        "LOCALHOST",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::ffff:169.254.169.254]",
        "[::127.0.0.1]",
        "[::]",
        "[::1]",
        "[fe80::1%25lo]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "224.0.0.1",
    ],
)
async def test_notations_of_the_node(
    images: Images, public: Server, serve: Callable[..., Any], host: str
) -> None:
    inner = await inner_service(serve)
    redirect_of("/blobs/")(public, f"http://{host}:{port_of(inner)}")
    assert isinstance(await error_of(images, public), PermissionDenied)
    assert inner.requests == []


@pytest.mark.parametrize("lead", LEADS)
async def test_open_and_closed_ports_look_the_same(
    images: Images, public: Server, serve: Callable[..., Any], lead: Lead
) -> None:
    """Ports of the node, where nobody is asked, and of private networks, where somebody is."""
    texts = set()
    for address in ("127.0.0.1", PRIVATE):
        inner = await serve(address)

        async def no(_: web.Request) -> web.StreamResponse:
            body = {"errors": [{"code": "DENIED", "message": INNER_TEXT}]}
            return web.json_response(body, status=404)

        inner.hooks.append(no)
        for port in (port_of(inner), "1"):
            lead(public, f"http://{address}:{port}")
            text = str(await error_of(images, public))
            texts.add(text.replace(f"{address}:{port}", address))
        assert len(texts) == 1
        texts.clear()


async def test_a_name_that_is_resolved_again(
    images: Images, public: Server, serve: Callable[..., Any], names: Names, place: Place
) -> None:
    """DNS rebinding: a registry becomes the node, under its own name and its own origin."""
    port = port_of(public)
    with socket.create_server(("127.0.0.1", int(port))) as inner:
        inner.setblocking(False)
        names["registry.example"] = [PUBLIC]
        place.hosts(f"registry.example:{port}", f'server = "http://registry.example:{port}"')

        async def rebind(request: web.Request) -> web.StreamResponse | None:
            if "/blobs/" not in request.path:
                return None
            names["registry.example"] = ["127.0.0.1"]
            images._session.http.connector.clear_dns_cache()  # type: ignore[union-attr]
            headers = {"Location": "/pods", "Connection": "close"}
            return web.Response(status=307, headers=headers)

        public.hooks.append(rebind)
        with pytest.raises(PermissionDenied, match="refused"):
            await images.pull(f"registry.example:{port}/test/image:1")
        with pytest.raises(BlockingIOError):
            inner.accept()


async def test_a_name_with_several_addresses(
    images: Images, public: Server, serve: Callable[..., Any], names: Names
) -> None:
    """Those that may be asked are."""
    storage = await inner_service(serve, ELSEWHERE)
    port = port_of(storage)
    with socket.create_server(("127.0.0.1", int(port))) as inner:
        inner.setblocking(False)
        names["both.example"] = ["127.0.0.1", ELSEWHERE]
        redirect_of(DIGEST)(public, f"http://both.example:{port}")
        await images.pull(f"{public.host}/test/image:1")
        with pytest.raises(BlockingIOError):
            inner.accept()
    assert len(storage.requests) == 1


async def test_a_connection_of_another_pull(
    images: Images, public: Server, serve: Callable[..., Any], place: Place
) -> None:
    """Whoever names a registry on loopback may ask it; its connection is not there for others."""
    inner = await registry_at(serve, place, "127.0.0.1")
    await images.pull(f"{inner.host}/test/image:1")
    await images.remove(f"{inner.host}/test/image:1")
    asked = len(inner.requests)
    redirect_of("/blobs/")(public, inner.url)
    assert isinstance(await error_of(images, public), PermissionDenied)
    assert len(inner.requests) == asked


async def test_a_mirror_on_the_node_does_not_speak_for_the_registry(
    place: Place, public: Server, serve: Callable[..., Any]
) -> None:
    """A mirror passes on what images say, and these are anybody's."""
    mirror, inner = await serve("127.0.0.1"), await inner_service(serve)
    mirror.add(SAMPLE)
    layer_url(mirror, f"http://127.0.0.1:{port_of(inner)}")
    place.hosts(public.host, f'server = "{public.url}"\n[host."{mirror.url}"]')
    async with place.open() as images:
        await images.pull(f"{public.host}/test/image:1")  # the registry has the layer
    assert inner.requests == []


async def test_a_proxy_is_not_asked_for_addresses_of_the_node(
    place: Place, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = await serve("127.0.0.1")
    proxy.add(SAMPLE)
    monkeypatch.setenv("http_proxy", proxy.url)
    place.hosts("registry.example", 'server = "http://registry.example"')
    async with place.open() as images:
        await images.pull("registry.example/test/image:1")
        await images.remove("registry.example/test/image:1")
        for host in (METADATA, "2852039166", "[::ffff:169.254.169.254]", "a.localhost"):
            redirect_of("/blobs/")(proxy, f"http://{host}")
            with pytest.raises(PermissionDenied, match="refused"):
                await images.pull("registry.example/test/image:1")
    assert {request.headers["Host"] for request in proxy.requests} == {"registry.example"}


# --- as far in as the registry ---


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize(
    ("registry", "target", "private", "allowed"),
    [
        (PUBLIC, ELSEWHERE, False, True),
        (PUBLIC, STORAGE, True, True),
        (PUBLIC, STORAGE, False, False),
        (PRIVATE, STORAGE, False, True),
        (PRIVATE, "127.0.0.1", True, False),
        ("127.0.0.1", STORAGE, False, True),
        ("127.0.0.1", "127.0.0.1", False, True),
    ],
)
async def test_registries_lead_as_far_in_as_they_are(
    place: Place,
    serve: Callable[..., Any],
    lead: Lead,
    registry: str,
    target: str,
    private: bool,
    allowed: bool,
) -> None:
    server = await registry_at(serve, place, registry)
    inner = await inner_service(serve, target)
    inner.hooks.insert(0, manifests)
    lead(server, inner.url)
    async with place.open(limits=Limits(private_redirects=private)) as images:
        if allowed:
            await images.pull(f"{server.host}/test/image:1")
        else:
            assert "refused" in str(await error_of(images, server))
    assert bool(inner.requests) is allowed


async def manifests(request: web.Request) -> web.StreamResponse | None:
    """What is meant where a manifest is asked for at another server, or the config."""
    if "manifest" in request.headers.get("Accept", ""):
        document, media_type = SAMPLE.top()
        return web.Response(body=document, headers={"Content-Type": media_type})
    return None


# --- what others say ---


async def broken(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.write(f"SSH-2.0-{INNER_TEXT}\r\n\r\n".encode())
    request.transport.close()
    return web.Response()


def answering(status: int, body: bytes) -> Callable[[web.Request], Any]:
    async def hook(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status, body=body)

    return hook


SAID = json.dumps({"errors": [{"code": "X", "message": INNER_TEXT}]}).encode()


@pytest.mark.parametrize("lead", LEADS)
async def test_what_another_server_says_is_told_to_nobody(
    images: Images, public: Server, serve: Callable[..., Any], lead: Lead
) -> None:
    other = await serve(ELSEWHERE)
    lead(public, other.url)
    texts = set()
    for answer in (
        broken,
        *(answering(status, SAID) for status in (404, 400, 500, 302)),
        answering(200, b"short " + INNER_TEXT.encode()),
        answering(200, b'{"schemaVersion":2,"layers":[{"mediaType":"INNER-TEXT"}]}'),
    ):
        other.hooks[:] = [answer]
        error = await error_of(images, public)
        assert isinstance(error, RegistryUnavailable) or lead is layer_url
        texts.add(str(error))
    assert len(texts) == 1


async def test_a_token_service_elsewhere_may_deny(
    images: Images, public: Server, serve: Callable[..., Any]
) -> None:
    """A user with a wrong password must learn of it, but in our words."""
    other = await serve(ELSEWHERE)
    token_service(public, other.url)
    other.hooks[:] = [answering(401, SAID)]
    error = await error_of(images, public, USER)
    assert isinstance(error, PermissionDenied)
    assert re.search(rf"{other.host}: access denied", str(error))


async def test_what_the_registry_says_is_told(images: Images, public: Server) -> None:
    public.hooks[:] = [answering(400, SAID.replace(INNER_TEXT.encode(), b"too many pulls"))]
    assert "too many pulls" in str(await error_of(images, public))


async def test_what_is_no_http_is_not_told(images: Images, public: Server) -> None:
    public.hooks[:] = [broken]
    assert "not HTTP" in str(await error_of(images, public))


async def test_another_content_is_not_described(
    images: Images, public: Server, serve: Callable[..., Any]
) -> None:
    other = await serve(ELSEWHERE)
    content = INNER_TEXT.encode().ljust(len(BLOB))
    other.hooks.append(answering(200, content))
    redirect_of(DIGEST)(public, other.url)
    error = await error_of(images, public)
    assert DIGEST in str(error)
    assert tars.digest(content) not in str(error)


# --- TLS ---


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for both servers that signs itself, with its key in the same file."""
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
    names = f"-subj /CN=test -addext subjectAltName=IP:{PUBLIC},IP:{ELSEWHERE}"
    files = "-keyout key.pem -out cert.pem"
    subprocess.run(
        f"{command} {names} {files}".split(), cwd=folder, check=True, capture_output=True
    )
    both = folder / "both.pem"
    both.write_text((folder / "cert.pem").read_text() + (folder / "key.pem").read_text())
    return both


@pytest.mark.parametrize(
    "lead", [pytest.param(redirect_of(DIGEST), id="blob"), pytest.param(token_service, id="token")]
)
async def test_tls_settings_of_a_host_are_for_its_own_origin(
    place: Place, serve: Callable[..., Any], certificate: Path, lead: Lead
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.load_verify_locations(certificate)
    context.verify_mode = ssl.CERT_OPTIONAL
    server, other = (
        await serve(PUBLIC, context),
        await inner_service(lambda address: serve(address, context), ELSEWHERE),
    )
    server.add(SAMPLE)
    lead(server, other.url)
    settings = f'server = "{server.url}"\nclient = "{certificate}"\n'
    shown: list[tuple[Server, bool]] = []

    def remember(at: Server) -> Any:
        async def hook(request: web.Request) -> None:
            assert request.transport is not None
            shown.append((at, bool(request.transport.get_extra_info("peercert"))))

        return hook

    server.hooks.insert(0, remember(server))
    other.hooks.insert(0, remember(other))
    async with place.open() as images:
        place.hosts(server.host, settings + "skip_verify = true")
        assert isinstance(await error_of(images, server, USER), RegistryUnavailable)
        assert other.requests == []
        place.hosts(server.host, settings + f'ca = "{certificate}"')
        await images.pull(f"{server.host}/test/image:1", USER)
    assert {has for at, has in shown if at is server} == {True}
    assert {has for at, has in shown if at is other} == {False}
