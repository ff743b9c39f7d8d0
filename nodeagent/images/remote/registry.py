"""One server of the distribution API (distribution-spec, "Pull"): requests, and answers to its challenges.

Credentials follow no redirect and no challenge but the server's own.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from nodeagent.errors import DataLoss, PermissionDenied, RegistryUnavailable
from nodeagent.images import manifest
from nodeagent.images.manifest import Descriptor
from nodeagent.images.reference import Kind, is_digest
from nodeagent.images.remote import auth
from nodeagent.images.remote.auth import Credentials
from nodeagent.images.remote.client import (
    Client,
    is_encoded,
    raise_for_status,
    read_bounded,
    received,
)
from nodeagent.images.remote.destinations import Scope
from nodeagent.images.remote.hosts import Host

_MAX_TOKEN_BYTES = 1 << 20


class Endpoint:
    """A server, for one repository and one caller. The texts of errors name the server, not the image.

    kind: what the repository has, for these texts.
    """

    def __init__(
        self,
        client: Client,
        host: Host,
        credentials: Credentials,
        *,
        domain: str,
        repository: str,
        kind: Kind = "image",
    ) -> None:
        self.host = host
        self._client = client
        self._credentials = credentials
        self._domain = domain
        self._repository = repository
        self._kind = kind
        self._root = URL(host.root, encoded=True)
        self._query = {"ns": domain} if host.mirror else {}
        self._is_encoded = False
        token = credentials.registry_token
        self._authorization = f"Bearer {token}" if token else ""

    @property
    def scope(self) -> Scope:
        """The scope of the server, by the requests that it has answered."""
        return self._client.scope

    async def manifest(
        self, version: str, parse: Callable[[bytes, str], object] = manifest.parse_manifest
    ) -> tuple[bytes, str]:
        """Fetch the document that a tag or a digest names, and its media type. Raises as `parse`, and `DataLoss`."""
        url = self._url("manifests", version)
        async with self._get(url, {"Accept": manifest.ACCEPT}) as response:
            data = await read_bounded(response, manifest.MAX_DOCUMENT_BYTES)
            media_type = response.headers.get("Content-Type", "")
            # Here, where the answer of another server becomes no error's text.
            if is_digest(version) and manifest.digest(data) != version:
                raise DataLoss(f"{self.host.root}: {version} is another document there")
            parse(data, media_type)
            return data, media_type

    async def blob(self, descriptor: Descriptor, offset: int) -> AsyncGenerator[bytes]:
        """Fetch the bytes of a blob from `offset` on, exactly as many as it must have."""
        url = self._url("blobs", descriptor.digest)
        async with self._get(url, _range(0 if self._is_encoded else offset)) as response:
            self._is_encoded = is_encoded(response, descriptor.size)
            async for chunk in _exactly(response, descriptor, offset):
                yield chunk

    def _url(self, kind: str, name: str) -> URL:
        path = f"{self._root.path.rstrip('/')}/{self._repository}/{kind}/{name}"
        return self._root.with_path(path, encoded=True).with_query(self._query)

    @asynccontextmanager
    async def _get(
        self, url: URL, headers: Mapping[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request, answer one challenge of the server, and yield a successful response."""
        async with self._client.get(
            url, headers, self._own_headers(), led=self.host.root
        ) as response:
            challenges = self._challenges(response)
            if not challenges:
                await self._raise_for_status(url, response)
                yield response
                return
        await self._authorize(challenges)
        async with self._client.get(
            url, headers, self._own_headers(), led=self.host.root
        ) as response:
            await self._raise_for_status(url, response)
            yield response

    async def _raise_for_status(self, asked: URL, response: aiohttp.ClientResponse) -> None:
        """Raise the error of an unsuccessful response, with what the owner of a pod can do about it."""
        version = "digest" if is_digest(asked.name) else "tag"
        missing = f"look at the {self._kind}'s name and {version}"
        if "/blobs/" in asked.path:
            missing = f"a part of the {self._kind} is not there any more, push it again"
        await raise_for_status(response, denied=self._denied(), missing=missing)

    # --- authorisation ---

    def _denied(self) -> str:
        if self.host.mirror:
            return "a mirror is asked without credentials"
        if self._credentials == auth.ANONYMOUS:
            return (
                f"no credentials were given for {self._domain}: "
                f"a private {self._kind} needs a pull secret"
            )
        return f"the credentials for {self._domain} do not allow it"

    def _own_headers(self) -> Mapping[str, str]:
        headers = CIMultiDict(self.host.headers)
        if self._authorization:
            headers["Authorization"] = self._authorization
        return headers

    def _challenges(self, response: aiohttp.ClientResponse) -> list[auth.Challenge]:
        """The challenges to answer; none if another server asks, or if there is no other answer to give."""
        final = not self._client.is_own(response.url) or self._credentials.registry_token
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
        options: dict[str, Any] = {"data": asked.form} if asked.form else {}
        if asked.authorization:
            options["headers"] = {"Authorization": asked.authorization}
        method, url = ("POST", url) if asked.form else ("GET", url.update_query(asked.query))
        led = f"{self.host.root}: has its token service at {url.origin()}"
        async with self._client.exchange(method, url, led=led, **options) as response:
            denied = response.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
            if not denied or self._client.is_own(url):
                await raise_for_status(response, denied=self._denied())
                return auth.parse_token(await read_bounded(response, _MAX_TOKEN_BYTES))
        # Reported for another server as well, as the credentials may be wrong; its other errors are all the same one.
        raise PermissionDenied(f"{led}: access denied, or no such repository; {self._denied()}")


async def elsewhere(
    client: Client, url: str, descriptor: Descriptor, offset: int
) -> AsyncGenerator[bytes]:
    """Fetch a layer that is kept outside of any registry, from `offset` on."""
    place = URL(url, encoded=True)
    led = f"{descriptor.digest}: is kept at {place.origin()}"
    async with client.get(place, _range(offset), {}, led=led) as response:
        await raise_for_status(response)
        async for chunk in _exactly(response, descriptor, offset):
            yield chunk


def _range(offset: int) -> Mapping[str, str]:
    return {"Range": f"bytes={offset}-"} if offset else {}


async def _exactly(
    response: aiohttp.ClientResponse, descriptor: Descriptor, offset: int
) -> AsyncGenerator[bytes]:
    """The body, checked to have the blob's size. Raises `DataLoss`, `RegistryUnavailable`."""
    async for chunk in received(response, offset, descriptor.size):
        offset += len(chunk)
        if offset > descriptor.size:
            raise DataLoss(f"{descriptor.digest}: longer than its {descriptor.size} bytes")
        yield chunk
    if offset < descriptor.size:
        raise RegistryUnavailable(f"{descriptor.digest}: ends after {offset} bytes")
