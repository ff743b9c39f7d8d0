"""One server of the distribution API (distribution-spec, "Pull"): requests, authorisation, redirects, time limits.

Whatever a server does ends in a bounded time: a connection that is not made, that says nothing, or that is slower than
a floor is given up with `RegistryUnavailable`. Credentials follow no redirect and no challenge but the server's own.
"""

import asyncio
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from http import HTTPStatus
from urllib.request import getproxies, proxy_bypass

import aiohttp
import msgspec
from multidict import CIMultiDict
from yarl import URL

from nodeagent.errors import InvalidArgument, NotFound, PermissionDenied, RegistryUnavailable
from nodeagent.images import auth, manifest
from nodeagent.images.auth import Credentials
from nodeagent.images.hosts import Host, http_url, is_loopback
from nodeagent.images.manifest import Descriptor
from nodeagent.images.resolver import Resolver

SILENCE_SECONDS = 20.0
FLOOR_WINDOW_SECONDS = 10.0
FLOOR_BYTES_PER_SECOND = 1024

_MAX_REDIRECTS = 5
_MAX_TOKEN_BYTES = 1 << 20
_MAX_ERROR_BYTES = 4096
_MAX_FIELD_BYTES = 32 << 10  # signed URLs in Location are long
_BUFFER_BYTES = 1 << 20
_REDIRECTS = frozenset((301, 302, 303, 307, 308))


class _ErrorEntry(msgspec.Struct):
    code: str = ""
    message: str = ""


class _ErrorBody(msgspec.Struct):
    errors: tuple[_ErrorEntry, ...] = ()


def open_session() -> aiohttp.ClientSession:
    """What all servers share: no cookies, no decompression, nothing that is followed by itself."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, resolver=Resolver()),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        read_bufsize=_BUFFER_BYTES,
        max_line_size=_MAX_FIELD_BYTES,
        max_field_size=_MAX_FIELD_BYTES,
        headers={"User-Agent": "nodeagent", "Accept-Encoding": "identity"},
    )


def tls_context(host: Host) -> ssl.SSLContext | bool:
    """True is the usual one. Reads files: not for the event loop. Raises `InvalidArgument` that names a bad one."""
    if not (host.ca or host.client or host.skip_verify):
        return True
    context = ssl.create_default_context()
    path = None
    try:
        for path in host.ca:
            context.load_verify_locations(cafile=path)
        for path, key in host.client:
            context.load_cert_chain(path, key)
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"{path}: {error}") from None
    if host.skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class Endpoint:
    """A server, for one repository and one caller. The errors' texts name the server, not the image."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        host: Host,
        tls: ssl.SSLContext | bool,
        credentials: Credentials,
        *,
        domain: str,
        repository: str,
    ) -> None:
        self.host = host
        self._session = session
        self._tls = tls
        self._credentials = credentials
        self._repository = repository
        self._root = URL(host.root, encoded=True)
        self._query = {"ns": domain} if host.mirror else {}
        self._timeout = aiohttp.ClientTimeout(
            total=None, connect=host.dial_seconds, sock_read=SILENCE_SECONDS
        )
        token = credentials.registry_token
        self._authorization = f"Bearer {token}" if token else ""

    async def manifest(self, version: str) -> tuple[bytes, str]:
        """The document that a tag or a digest names, and its media type."""
        url = self._url("manifests", version)
        async with self._get(url, {"Accept": manifest.ACCEPT}) as response:
            data = await _read_bounded(response, manifest.MAX_DOCUMENT_BYTES)
            return data, response.headers.get("Content-Type", "")

    def blob(self, descriptor: Descriptor, offset: int) -> AsyncGenerator[bytes]:
        """The bytes of a blob from `offset` on, as they come."""
        return self._stream(self._url("blobs", descriptor.digest), offset)

    def content(self, offset: int) -> AsyncGenerator[bytes]:
        """The same of what is at the root itself: a layer that is kept outside of any registry."""
        return self._stream(self._root, offset)

    async def _stream(self, url: URL, offset: int) -> AsyncGenerator[bytes]:
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        async with self._get(url, headers) as response:
            async for chunk in _received(response, offset):
                yield chunk

    def _url(self, kind: str, name: str) -> URL:
        path = f"{self._root.path.rstrip('/')}/{self._repository}/{kind}/{name}"
        return self._root.with_path(path, encoded=True).with_query(self._query)

    @asynccontextmanager
    async def _get(
        self, url: URL, headers: Mapping[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A successful response; answers one challenge of the server."""
        async with self._follow(url, headers, self._own_headers()) as response:
            challenges = self._challenges(response)
            if not challenges:
                _raise_for_status(response.status, await _explanation(response), str(url))
                yield response
                return
        await self._authorize(challenges)
        async with self._follow(url, headers, self._own_headers()) as response:
            _raise_for_status(response.status, await _explanation(response), str(url))
            yield response

    @asynccontextmanager
    async def _follow(
        self, url: URL, headers: Mapping[str, str], own: Mapping[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Follows redirects. own: headers for this server only."""
        with _network_errors(str(url)):
            for _ in range(_MAX_REDIRECTS + 1):
                sent = CIMultiDict(headers)
                if url.origin() == self._root.origin():
                    sent.extend(own)
                async with self._request("GET", url, headers=sent) as response:
                    if response.status not in _REDIRECTS:
                        yield response
                        return
                    url = _redirection(url, response.headers.get("Location", ""))
        raise RegistryUnavailable(f"{url}: more than {_MAX_REDIRECTS} redirects")

    def _request(
        self, method: str, url: URL, **options: Mapping[str, str]
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        return self._session.request(
            method,
            url,
            allow_redirects=False,
            ssl=self._tls,
            timeout=self._timeout,
            proxy=self.host.proxy or _proxy(url),
            **options,  # type: ignore[arg-type]
        )

    # --- authorisation ---

    def _own_headers(self) -> Mapping[str, str]:
        headers = CIMultiDict(self.host.headers)
        if self._authorization:
            headers["Authorization"] = self._authorization
        return headers

    def _challenges(self, response: aiohttp.ClientResponse) -> list[auth.Challenge]:
        """Empty where another server asks, and where no other answer can be given."""
        own = response.url.origin() == self._root.origin()
        final = not own or self._credentials.registry_token
        if response.status != HTTPStatus.UNAUTHORIZED or final:
            return []
        return auth.parse_challenges(response.headers.getall("WWW-Authenticate", []))

    async def _authorize(self, challenges: list[auth.Challenge]) -> None:
        by_scheme = {challenge.scheme: challenge for challenge in reversed(challenges)}
        if bearer := by_scheme.get("bearer"):
            self._authorization = f"Bearer {await self._token(bearer)}"
        elif "basic" in by_scheme and self._credentials.basic:
            self._authorization = self._credentials.basic
        else:
            self._authorization = ""

    async def _token(self, challenge: auth.Challenge) -> str:
        scope = f"repository:{self._repository}:pull"
        asked = auth.token_request(challenge, self._credentials, scope, root=self.host.root)
        url = URL(asked.realm, encoded=True)
        headers = {"Authorization": asked.authorization} if asked.authorization else {}
        with _network_errors(asked.realm):
            if asked.form:
                answer = self._request("POST", url, headers=headers, data=asked.form)
            else:
                answer = self._request("GET", url.update_query(asked.query), headers=headers)
            async with answer as response:
                _raise_for_status(response.status, await _explanation(response), asked.realm)
                return auth.parse_token(await _read_bounded(response, _MAX_TOKEN_BYTES))


async def _received(response: aiohttp.ClientResponse, offset: int) -> AsyncGenerator[bytes]:
    """The body from `offset` on; a server that knows no ranges sends all of it."""
    skip = offset
    if response.status == HTTPStatus.PARTIAL_CONTENT:
        if not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
            raise RegistryUnavailable(
                f"{response.url.with_query(None)}: another range than asked for"
            )
        skip = 0
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
                    f"{response.url.with_query(None)}: stalled, {got} bytes in {waited:.0f} s"
                )
            waited, got = 0.0, 0
        skipped = min(skip, len(chunk))
        skip -= skipped
        if len(chunk) > skipped:
            yield chunk[skipped:]


async def _read_bounded(response: aiohttp.ClientResponse, size: int) -> bytes:
    data = bytearray()
    async for chunk in _received(response, 0):
        data += chunk
        if len(data) > size:
            raise InvalidArgument(f"{response.url.with_query(None)}: longer than {size} bytes")
    return bytes(data)


async def _explanation(response: aiohttp.ClientResponse) -> str:
    """What a registry says about an error (distribution-spec, "Error Codes"), on one line."""
    if response.status < HTTPStatus.BAD_REQUEST:
        return ""
    try:
        body = await response.content.read(_MAX_ERROR_BYTES)
        errors = msgspec.json.decode(body, type=_ErrorBody).errors
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""
    texts = (f": {error.code.lower()} {error.message}" for error in errors[:3])
    return "".join(char if char.isprintable() else " " for text in texts for char in text)[:300]


def _raise_for_status(status: int, explanation: str, url: str) -> None:
    if status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
        return
    text = f"{url.partition('?')[0]}: {status}{explanation}"
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        raise PermissionDenied(f"{text}: access denied, or no such repository")
    if status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
        raise NotFound(text)
    raise RegistryUnavailable(text)


def _redirection(base: URL, location: str) -> URL:
    """Where to go next. Signed URLs must stay as they are, byte for byte."""
    try:
        target = http_url(location, base)
    except ValueError:
        raise RegistryUnavailable(f"{base}: redirects to a URL that cannot be asked") from None
    if base.scheme == "https" and target.scheme == "http":
        raise RegistryUnavailable(f"{base}: redirects from HTTPS to plain HTTP")
    return target


@contextmanager
def _network_errors(url: str) -> Iterator[None]:
    """What aiohttp and the kernel raise becomes `RegistryUnavailable`, without the query, which may be secret."""
    place = url.partition("?")[0]
    try:
        yield
    except TimeoutError:
        raise RegistryUnavailable(f"{place}: timed out") from None
    except (aiohttp.ClientError, OSError) as error:
        reason = str(error).partition("?")[0] or type(error).__name__
        raise RegistryUnavailable(f"{place}: {reason}") from None


def _proxy(url: URL) -> str | None:
    """As HTTPS_PROXY, HTTP_PROXY and NO_PROXY say; never for this very machine."""
    if is_loopback(url.host or "") or proxy_bypass(url.host or ""):
        return None
    return getproxies().get(url.scheme)
