"""HTTP with one registry, and with the servers that it leads to: redirects, time limits, TLS, proxies.

Whatever a server does ends in a bounded time: a connection that is not made, that says nothing, or that is slower than
a floor is given up with `RegistryUnavailable`. What belongs to the registry's own origin (credentials and headers, a
client certificate, the leave not to verify) goes to no other. What another server says goes to the agent's log, and
never into an error: the owner of a pod would read there what answers in the node's networks, and what does not.

A proxy looks up names itself, so that only what is an address, or localhost, is judged here before it gets a request;
that it leads to nothing of its own or inside of its network is for its configuration to say.
"""

import asyncio
import dataclasses
import logging
import os
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from http import HTTPStatus
from typing import Any, NamedTuple, Self

import aiohttp
import msgspec
from multidict import CIMultiDict
from yarl import URL

from nodeagent.errors import (
    InvalidArgument,
    NodeAgentError,
    NotFound,
    PermissionDenied,
    RegistryUnavailable,
)
from nodeagent.images.remote import codings
from nodeagent.images.remote.codings import Decoder, Undecodable
from nodeagent.images.remote.destinations import Connector, Scope, Visit, scope_of_name
from nodeagent.images.remote.failures import MAX_TEXT, network_errors, place
from nodeagent.images.remote.hosts import Host, http_url
from nodeagent.images.remote.proxies import Proxies, Proxy
from nodeagent.images.remote.throttling import Throttled, Throttles
from nodeagent.text import one_line

log = logging.getLogger(__name__)

SILENCE_SECONDS = 20.0
FLOOR_WINDOW_SECONDS = 10.0
FLOOR_BYTES_PER_SECOND = 1024

_MAX_REDIRECTS = 10  # as Go's clients have it
_MAX_ERROR_BYTES = 4096
_MAX_FIELD_BYTES = 32 << 10  # signed URLs in Location are long
_BUFFER_BYTES = 1 << 20
_SLICE_BYTES = 16 << 10  # of an encoded answer, between turns of others
_REDIRECTS = frozenset((301, 302, 303, 307, 308))


class _ErrorEntry(msgspec.Struct):
    code: str = ""
    message: str = ""


class _ErrorBody(msgspec.Struct):
    errors: tuple[_ErrorEntry, ...] = ()


class _Refused(PermissionDenied):
    """A registry led to an address to which no registry at its place may lead."""


class Session:
    """The state that all pulls share: connections, proxies, and the servers that have asked for a pause.

    It has no cookies, and decodes and follows nothing by itself.
    """

    def __init__(self) -> None:
        self.proxies = Proxies(os.environ)
        self.throttles = Throttles()
        self.http = aiohttp.ClientSession(
            connector=Connector(),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            read_bufsize=_BUFFER_BYTES,
            max_line_size=_MAX_FIELD_BYTES,
            max_field_size=_MAX_FIELD_BYTES,
            headers={"User-Agent": "nodeagent", "Accept-Encoding": "identity"},
        )

    def request(
        self, method: str, url: URL, proxy: Proxy | None, headers: Mapping[str, str], **options: Any
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """Make one request. The secret of a proxy is not sent to the server behind a tunnel."""
        sent = CIMultiDict(headers)
        if proxy is not None:
            authorization = {"Proxy-Authorization": proxy.authorization}
            options["proxy"] = proxy.url
            if proxy.authorization and url.scheme == "https":
                options["proxy_headers"] = authorization
            elif proxy.authorization:
                sent.update(authorization)
        return self.http.request(method, url, headers=sent, allow_redirects=False, **options)

    async def close(self) -> None:
        await self.http.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def open_session() -> Session:
    """Open a session, one for all pulls. The environment has its proxies."""
    return Session()


class Tls(NamedTuple):
    """How to verify a registry, and the servers that it leads to. True is by the system's authorities."""

    own: ssl.SSLContext | bool = True
    others: ssl.SSLContext | bool = True

    @classmethod
    def of(cls, host: Host) -> Self:
        """Make both from a host's files. The operator's authorities count for both: a token service often has the same.

        Reads files: not for the event loop. Raises `InvalidArgument` that names a bad one.
        """
        return cls(
            _context(host), _context(dataclasses.replace(host, client=(), skip_verify=False))
        )


def _context(host: Host) -> ssl.SSLContext | bool:
    if not (host.ca or host.client or host.skip_verify):
        return True
    context = ssl.create_default_context()
    path = None
    try:
        for path in host.ca:
            context.load_verify_locations(cafile=path)
        for path, key in host.client:
            context.load_cert_chain(path, key)
    except (ssl.SSLError, FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise InvalidArgument(f"{path}: {error}") from None
    except OSError as error:  # of the disk, or of this process
        raise OSError(error.errno, error.strerror, str(path)) from None
    if host.skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class Client:
    """A client of one host, and of the servers that it leads to.

    floor: the scope to which every host may lead. led_by: the scope of the registry whose manifest names this host;
    None for a host that a reference or hosts.toml names.
    """

    def __init__(
        self,
        session: Session,
        host: Host,
        tls: Tls,
        *,
        floor: Scope,
        led_by: Scope | None = None,
    ) -> None:
        self._session = session
        self._host = host
        self._tls = tls
        self._floor = floor
        self._scope = led_by
        self._origin = URL(host.root, encoded=True).origin() if led_by is None else None
        self._timeout = aiohttp.ClientTimeout(
            total=None, connect=host.dial_seconds, sock_read=SILENCE_SECONDS
        )

    @property
    def scope(self) -> Scope:
        """The scope of the host: the most public one of all its connections, as it may have several addresses."""
        return Scope.PUBLIC if self._scope is None else self._scope

    def is_own(self, url: URL) -> bool:
        return url.origin() == self._origin

    @asynccontextmanager
    async def get(
        self, url: URL, headers: Mapping[str, str], own: Mapping[str, str], *, led: str
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a GET, follow redirects, and yield the response, of any status but a redirect's.

        own: headers for the host itself only. led: see `exchange`. The response must be read in the block: errors
        that are raised there are reported as those of the server.
        """
        for left in reversed(range(_MAX_REDIRECTS + 1)):
            sent = CIMultiDict(headers)
            if self.is_own(url):
                sent.extend(own)
            async with self.exchange("GET", url, led=led, headers=sent) as response:
                if response.status not in _REDIRECTS:
                    yield response
                    return
                if not left:
                    raise RegistryUnavailable(f"{place(url)}: more than {_MAX_REDIRECTS} redirects")
                target = _redirection(url, response.headers.get("Location", ""))
            if self.is_own(url):
                led = f"{place(url)}: redirects to {target.origin()}"
            url = target

    @asynccontextmanager
    async def exchange(
        self, method: str, url: URL, *, led: str, **options: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Make one request. led: how the host led to another server, for the text of an error."""
        try:
            async with self._session.throttles.turn(url) as turn:
                with network_errors(url):
                    async with self._visit(method, url, led, options) as response:
                        turn.answered(response.status, response.headers)
                        yield response
        except _Refused:
            raise
        except NodeAgentError as error:
            if self.is_own(url):
                raise
            # The reason is for the log only: see the module's docstring.
            log.warning("%s: %s", led, error)
            text = f"{led}: no usable answer from there; the agent's log says why"
            told = (
                error.told_as(text) if isinstance(error, Throttled) else RegistryUnavailable(text)
            )
            raise told from None

    @asynccontextmanager
    async def _visit(
        self, method: str, url: URL, led: str, options: dict[str, Any]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        own = self.is_own(url)
        # Once the host has answered, its scope cannot widen: its name may have another address by now.
        limit = Scope.NODE if own and self._scope is None else max(self.scope, self._floor)
        named = scope_of_name(url.host or "")
        if named > limit:
            raise _refusal(led, limit)
        proxy = self._proxy(url)
        visit = Visit(Scope.NODE if proxy else limit)
        visit.begin()
        try:
            async with self._session.request(
                method,
                url,
                proxy,
                ssl=self._tls.own if own else self._tls.others,
                timeout=self._timeout,
                **{"headers": {}, **options},
            ) as response:
                if own:
                    self._answered(named if proxy else visit.reached)
                yield response
        except (aiohttp.ClientError, OSError):
            if visit.refused and visit.reached is None:
                raise _refusal(led, limit) from None
            raise

    def _proxy(self, url: URL) -> Proxy | None:
        if self._host.proxy:
            return Proxy.of(URL(self._host.proxy))
        proxy = self._session.proxies.of(url)
        if proxy is not None and proxy.url.scheme not in ("http", "https"):
            raise RegistryUnavailable(
                f"{place(url)}: {url.scheme.upper()}_PROXY is a {proxy.url.scheme} proxy, which the agent cannot "
                f"use; set one of http or https, or add {url.host} to NO_PROXY"
            )
        return proxy

    def _answered(self, scope: Scope | None) -> None:
        scope = Scope.PUBLIC if scope is None else scope
        self._scope = scope if self._scope is None else min(scope, self._scope)


# --- responses ---


async def received(
    response: aiohttp.ClientResponse, offset: int, size: int | None = None
) -> AsyncGenerator[bytes]:
    """The body from `offset` on; what a server without ranges sends before it is skipped.

    A body that a middle box compressed is decoded, by pieces. size: of the whole content, where that is known: a body
    of this very length is the content, and the coding that it claims was not applied, or is a part of it.
    """
    skip = offset
    if response.status == HTTPStatus.PARTIAL_CONTENT:
        if not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
            raise RegistryUnavailable(f"{place(response.url)}: another range than asked for")
        skip = 0
    try:
        async for chunk in _decoded(response, _decoder(response, size)):
            skipped = min(skip, len(chunk))
            skip -= skipped
            if len(chunk) > skipped:
                yield chunk[skipped:]
    except Undecodable as error:
        raise RegistryUnavailable(f"{place(response.url)}: {error}") from None


async def _decoded(
    response: aiohttp.ClientResponse, decoder: Decoder | None
) -> AsyncGenerator[bytes]:
    """The body, decoded in small steps with turns for others: one byte may become a thousand, or nothing."""
    async for data in _as_sent(response):
        if decoder is None:
            yield data
            continue
        for at in range(0, len(data), _SLICE_BYTES):
            for piece in decoder.decode(data[at : at + _SLICE_BYTES]):
                yield piece
                await asyncio.sleep(0)
            await asyncio.sleep(0)
    if decoder is not None:
        decoder.finish()


async def _as_sent(response: aiohttp.ClientResponse) -> AsyncGenerator[bytes]:
    """The body as it was sent, as long as it comes fast enough. Raises RegistryUnavailable."""
    clock = asyncio.get_running_loop().time
    waited, got = 0.0, 0
    while True:
        before = clock()
        chunk = await response.content.readany()
        waited, got = waited + clock() - before, got + len(chunk)
        if not chunk:
            return
        if waited > FLOOR_WINDOW_SECONDS:
            if got < waited * FLOOR_BYTES_PER_SECOND:
                raise RegistryUnavailable(
                    f"{place(response.url)}: stalled, {got} bytes in {waited:.0f} s"
                )
            waited, got = 0.0, 0
        yield chunk


def is_encoded(response: aiohttp.ClientResponse, size: int | None) -> bool:
    """Whether a middle box has compressed the body of `size` bytes, so that ranges count other bytes."""
    names = codings.named(response.headers.getall("Content-Encoding", []))
    return bool(names) and (size is None or _length(response) != size)


def _decoder(response: aiohttp.ClientResponse, size: int | None = None) -> Decoder | None:
    if not is_encoded(response, size):
        return None
    return codings.decoder_of(response.headers.getall("Content-Encoding", []))


def _length(response: aiohttp.ClientResponse) -> int | None:
    """The length of the whole content, as the response states it."""
    if response.status != HTTPStatus.PARTIAL_CONTENT:
        return response.content_length
    total = response.headers.get("Content-Range", "").rpartition("/")[2]
    return int(total) if total.isascii() and total.isdigit() and len(total) < 20 else None


async def read_bounded(response: aiohttp.ClientResponse, size: int) -> bytes:
    """Read the whole body, decoded. Raises `InvalidArgument` where it is longer than `size`."""
    data = bytearray()
    async with aclosing(received(response, 0)) as chunks:
        async for chunk in chunks:
            data += chunk
            if len(data) > size:
                raise InvalidArgument(f"{place(response.url)}: longer than {size} bytes")
    return bytes(data)


async def raise_for_status(
    response: aiohttp.ClientResponse, *, denied: str = "", missing: str = ""
) -> None:
    """Raise the error for any status but success, with the server's explanation and a remedy.

    denied: the remedy for 401 and 403; missing: for 404 and 410.
    """
    if HTTPStatus.OK <= response.status < HTTPStatus.MULTIPLE_CHOICES:
        return
    text = f"{place(response.url)}: {response.status}{await _explanation(response)}"
    if response.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        raise PermissionDenied(f"{text}: access denied, or no such repository{_then(denied)}")
    if response.status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
        raise NotFound(text + _then(missing))
    raise RegistryUnavailable(text)


def _then(remedy: str) -> str:
    return f"; {remedy}" if remedy else ""


async def _explanation(response: aiohttp.ClientResponse) -> str:
    """A registry's explanation of an error (distribution-spec, "Error Codes"), on one line."""
    if response.status < HTTPStatus.BAD_REQUEST:
        return ""
    try:
        body = await response.content.read(_MAX_ERROR_BYTES)
        if decoder := _decoder(response):
            body = next(decoder.decode(body), b"")[:_MAX_ERROR_BYTES]
        errors = msgspec.json.decode(body, type=_ErrorBody).errors
    except (Undecodable, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""
    return one_line(
        "".join(f": {error.code.lower()} {error.message}" for error in errors[:3]), MAX_TEXT
    )


# --- where to ---


def _redirection(base: URL, location: str) -> URL:
    """The target of a redirect. Signed URLs must stay as they are, byte for byte."""
    try:
        target = http_url(location, base)
    except ValueError:
        raise RegistryUnavailable(
            f"{place(base)}: redirects to a URL that cannot be asked"
        ) from None
    if base.scheme == "https" and target.scheme == "http":
        raise RegistryUnavailable(f"{place(base)}: redirects from HTTPS to plain HTTP")
    return target


def _refusal(led: str, limit: Scope) -> _Refused:
    if limit is Scope.PUBLIC:
        why = "to no public address, as the registry has (images.private_redirects)"
    else:
        why = "to a loopback, link-local or metadata address, which the registry is not at itself"
    return _Refused(f"{led}: refused, it leads {why}")
