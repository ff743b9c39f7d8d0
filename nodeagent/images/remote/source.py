"""A repository on all the hosts that have it, as one caller may see it.

Hosts are tried in their order, and again for some rounds if they are busy or out of reach. A blob that breaks off, or
whose host is stalled, is resumed at the next host where it stopped; no pull waits for a bad mirror for long.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

from nodeagent.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NodeAgentError,
    NotFound,
    PermissionDenied,
    RegistryUnavailable,
)
from nodeagent.images import manifest
from nodeagent.images.manifest import Descriptor
from nodeagent.images.reference import Kind, Reference, is_digest
from nodeagent.images.remote import throttling
from nodeagent.images.remote.auth import Auth, credentials
from nodeagent.images.remote.client import Client, Session, Tls
from nodeagent.images.remote.destinations import Scope
from nodeagent.images.remote.hosts import Host, hosts_of, http_url
from nodeagent.images.remote.registry import Endpoint, elsewhere
from nodeagent.images.remote.throttling import Throttled

ROUNDS = 3  # over all hosts, without getting on
PROGRESS_BYTES = 64 << 10  # less from a connection is not getting on
FIRST_PAUSE_SECONDS = 0.2
REFUSALS = 5  # of a host that asks for pauses
HELD_UP_SECONDS = 120.0  # over all the pauses of a pull

_REFUSALS = (DataLoss, InvalidArgument, NotFound, PermissionDenied)
_MAX_URLS = 4

T = TypeVar("T")
Stream = Callable[[int], AsyncGenerator[bytes]]  # from an offset on


async def open_source(
    session: Session,
    reference: Reference,
    auth: Auth | None,
    hosts_dir: Path,
    floor: Scope,
    kind: Kind = "image",
) -> "Source":
    """Read the hosts' configuration, without sending a request. Raises `InvalidArgument`.

    floor: the scope to which every registry may lead. kind: what it is a source of, for the texts of errors.
    """

    def endpoint(host: Host) -> Endpoint:
        return Endpoint(
            Client(session, host, Tls.of(host), floor=floor),
            host,
            credentials(auth, reference.domain, host),
            domain=reference.domain,
            repository=reference.path,
            kind=kind,
        )

    def endpoints() -> list[Endpoint]:
        return [endpoint(host) for host in hosts_of(reference.domain, hosts_dir)]

    return Source(session, reference, await asyncio.to_thread(endpoints), floor, kind)


class Source:
    """The source of an image or profile. Errors name it, with the answer of each of the hosts."""

    def __init__(
        self,
        session: Session,
        reference: Reference,
        endpoints: Sequence[Endpoint],
        floor: Scope,
        kind: Kind = "image",
    ) -> None:
        self.reference = reference
        self._subject = f'{kind} "{reference}"'
        self._session = session
        self._floor = floor
        self._held_up = _HeldUp()
        self._endpoints = endpoints
        self._resolvers = [endpoint for endpoint in endpoints if endpoint.host.resolve]
        self._pullers = [endpoint for endpoint in endpoints if endpoint.host.pull]

    @property
    def attempts(self) -> int:
        """The number of hosts, each of which may turn out to have wrong content for a blob."""
        return max(1, len(self._pullers))

    def places(self, descriptor: Descriptor) -> tuple[str, ...]:
        """The URLs from which a blob is fetched, in this order."""
        return (*(descriptor.urls or ()), *(puller.host.root for puller in self._pullers))

    async def manifest(
        self, version: str, parse: Callable[[bytes, str], object] = manifest.parse_manifest
    ) -> tuple[bytes, str]:
        """Fetch the document of a tag or a digest, and its media type; parse: raises for a wrong one."""
        endpoints = self._pullers if is_digest(version) else self._resolvers
        return await self._first(endpoints, lambda endpoint: endpoint.manifest(version, parse))

    async def document(self, descriptor: Descriptor) -> bytes:
        """Fetch and verify a small blob."""
        if descriptor.size > manifest.MAX_DOCUMENT_BYTES:
            raise self._error([InvalidArgument(f"config of {descriptor.size} bytes")])
        errors = []
        for attempt in range(self.attempts):
            data = b"".join([chunk async for chunk in self.blob(descriptor, attempt)])
            if manifest.digest(data) == descriptor.digest:
                return data
            errors.append(DataLoss(f"{descriptor.digest}: got {len(data)} bytes of another digest"))
        raise self._error(errors)

    async def blob(
        self, descriptor: Descriptor, attempt: int = 0, offset: int = 0
    ) -> AsyncGenerator[bytes]:
        """Fetch a blob's bytes from `offset` on, unverified. Each later attempt leaves out one more host."""
        streams = deque([*self._foreign(descriptor), *self._own(descriptor)][attempt:])
        errors: dict[Stream, NodeAgentError] = {}
        patience = _Patience(self._held_up)
        while streams:
            stream, before = streams[0], offset
            try:
                async with aclosing(stream(offset)) as chunks:
                    async for chunk in chunks:
                        offset += len(chunk)
                        yield chunk
                return
            except RegistryUnavailable as error:
                _note(errors, stream, error)
                streams.rotate(-1)
                if not await patience.lasts(error, offset - before, len(streams)):
                    break
            except _REFUSALS as error:
                errors[stream] = error
                streams.popleft()
        raise self._error(errors.values())

    def _own(self, descriptor: Descriptor) -> list[Stream]:
        return [partial(endpoint.blob, descriptor) for endpoint in self._pullers]

    def _foreign(self, descriptor: Descriptor) -> list[Stream]:
        """The URLs outside of the registry at which a layer may be (image-spec ``descriptor.md``, urls).

        No secret is sent there. Any of the hosts may have sent the manifest: the most public of their scopes counts.
        """
        led_by = min((endpoint.scope for endpoint in self._endpoints), default=Scope.PUBLIC)
        return [
            partial(elsewhere, self._client_outside(url, led_by), url, descriptor)
            for url in islice(filter(_is_url, descriptor.urls or ()), _MAX_URLS)
        ]

    def _client_outside(self, url: str, led_by: Scope) -> Client:
        return Client(self._session, Host(root=url), Tls(), floor=self._floor, led_by=led_by)

    async def _first(
        self, endpoints: Sequence[Endpoint], ask: Callable[[Endpoint], Awaitable[T]]
    ) -> T:
        asked = deque(endpoints)
        errors: dict[Endpoint, NodeAgentError] = {}
        patience = _Patience(self._held_up)
        while asked:
            endpoint = asked[0]
            try:
                return await ask(endpoint)
            except RegistryUnavailable as error:
                _note(errors, endpoint, error)
                asked.rotate(-1)
                if not await patience.lasts(error, 0, len(asked)):
                    break
            except _REFUSALS as error:
                errors[endpoint] = error
                asked.popleft()
        raise self._error(errors.values())

    def _error(self, errors: Iterable[NodeAgentError]) -> NodeAgentError:
        """The error of the last host, which is the registry itself, with the texts of all of them."""
        said = list(errors)
        if not said:
            return FailedPrecondition(f"{self._subject}: hosts.toml allows no host for it")
        text = f"{self._subject}: {'; '.join(map(str, said))}"
        if isinstance(said[-1], RegistryUnavailable):
            return RegistryUnavailable(f"RegistryUnavailable: {text}")
        return type(said[-1])(text)


def _is_url(text: str) -> bool:
    try:
        return bool(http_url(text))
    except ValueError:
        return False


def _note(errors: dict[T, NodeAgentError], host: T, error: NodeAgentError) -> None:
    """Note an error of a host, unless it only says that the host was not asked again."""
    if host not in errors or not isinstance(error, Throttled) or error.sent:
        errors[host] = error


class _HeldUp:
    """The time for which a pull has waited for servers that asked for a pause; simultaneous waits count once."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._until = 0.0

    async def wait(self, until: float) -> bool:
        """Wait until then; False where the pull has waited too long already, as pauses may be asked for endlessly."""
        now = asyncio.get_running_loop().time()
        more = max(0.0, until - max(now, self._until))
        if self._seconds + more > HELD_UP_SECONDS:
            return False
        self._seconds += more
        self._until = max(self._until, until)
        await asyncio.sleep(until - now)
        return True


class _Patience:
    """The budget of retries: unlimited while attempts make progress, else some rounds over all hosts.

    A host that asked for a pause is waited for when none of the others has helped.
    """

    def __init__(self, held_up: _HeldUp) -> None:
        self._held_up = held_up
        self._idle = 0
        self._refused = 0
        self._pause = FIRST_PAUSE_SECONDS
        self._until: float | None = None

    async def lasts(self, error: RegistryUnavailable, got_bytes: int, hosts: int) -> bool:
        """Whether to try again; waits a little after each round."""
        self._idle = 0 if got_bytes >= PROGRESS_BYTES else self._idle + 1
        if isinstance(error, Throttled) and not throttling.is_too_long(error.until):
            self._refused += error.sent
            self._until = error.until if self._until is None else min(self._until, error.until)
        if self._refused >= REFUSALS * hosts:
            return False
        if self._idle and self._idle % hosts == 0 and self._until is not None:
            until, self._until, self._idle = self._until, None, 0
            return await self._held_up.wait(until)
        if self._idle >= ROUNDS * hosts:
            return False
        if self._idle and self._idle % hosts == 0:
            await asyncio.sleep(self._pause)
            self._pause *= 2
        return True
