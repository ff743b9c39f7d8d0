"""Downloads of blobs from registries into files: each is fetched once for an image, even if it is several layers.

Images share layers, not blobs: each fetches a blob from its own servers with its own credentials.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Hashable
from concurrent.futures import Executor
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from functools import partial

from nodeagent.errors import NodeAgentError, ResourceExhausted, Unavailable
from nodeagent.images.budget import is_full
from nodeagent.images.content import Blob
from nodeagent.images.manifest import Descriptor
from nodeagent.images.remote.source import Source
from nodeagent.images.turns import Turns
from nodeagent.images.usage import Counters
from nodeagent.tasks import Tasks, cancel, to_the_end
from nodeagent.trash import Trash

log = logging.getLogger(__name__)

Key = tuple[Source, str, int]

_CONNECTIONS = 64
_GRACE_SECONDS = 2.0  # to connect and to receive the first bytes


class Arrival:
    """A blob that is being fetched, or has been. task: fetches it."""

    task: "asyncio.Task[None]"

    def __init__(self, blob: Blob) -> None:
        self.blob = blob
        self.users = 0
        self._news = asyncio.Event()

    @property
    def is_complete(self) -> bool:
        return self.task.done() and not self.task.cancelled() and not self.task.exception()

    def tell(self) -> None:
        """Wake those that wait: there is more of it, or no more will come."""
        self._news.set()

    async def reaches(self, size_bytes: int) -> None:
        """Wait until so much of it is there, or nothing more will come."""
        while self.blob.received < size_bytes and not self.task.done():
            self._news.clear()
            await self._news.wait()

    async def complete(self) -> None:
        """Wait until all of it is there and verified; raises the error that prevented it."""
        await asyncio.wait([self.task])
        self.task.result()


class Downloads:
    """The blobs that are being fetched. writers: threads for writing and hashing, never for waiting.

    The number of connections is bounded, but ample; beyond it the slowest is closed, and goes on later from where it
    was.
    """

    def __init__(self, staging: Trash, writers: Executor, counters: Counters, tasks: Tasks) -> None:
        self._staging = staging
        self._writers = writers
        self._counters = counters
        self._tasks = tasks
        self._turns = Turns(_CONNECTIONS, _GRACE_SECONDS)
        self._arrivals: dict[Key, Arrival] = {}

    def of(self, source: Source) -> "Fetched":
        return Fetched(self, source)

    @asynccontextmanager
    async def open(
        self, descriptor: Descriptor, source: Source, attempt: int
    ) -> AsyncIterator[Arrival]:
        """Fetch a blob, or share it with those that fetch it; the last of them removes its file."""
        key = (source, descriptor.digest, attempt)
        arrival = self._arrivals.get(key)
        if arrival is None:
            arrival = self._arrivals[key] = self._start(key, descriptor)
        arrival.users += 1
        try:
            yield arrival
        finally:
            arrival.users -= 1
            if not arrival.users:
                # Forgotten first: nobody may join a blob whose file is about to be removed.
                self._forget(key, arrival)
                try:
                    await cancel(arrival.task)
                finally:
                    arrival.blob.close()
                    self._staging.discard(arrival.blob.path)

    def _start(self, key: Key, descriptor: Descriptor) -> Arrival:
        blob = Blob(self._staging.path("blob"), descriptor.digest, descriptor.size)
        arrival = Arrival(blob)
        arrival.task = self._tasks.start("download", self._fetch(arrival, descriptor, key))
        arrival.task.add_done_callback(lambda _task: self._landed(key, arrival))
        return arrival

    def _landed(self, key: Key, arrival: Arrival) -> None:
        """Wake those that wait. A failed blob is forgotten, so that later requests try again."""
        arrival.tell()
        if not arrival.is_complete:
            self._forget(key, arrival)

    async def _fetch(self, arrival: Arrival, descriptor: Descriptor, key: Key) -> None:
        source, _, attempt = key
        blob = arrival.blob
        try:
            while not await self._receive(arrival, descriptor, source, attempt):
                log.debug("%s: slower than others that wait, goes on later", blob.digest)
            blob.finish()
        except asyncio.CancelledError:
            blob.fail(Unavailable(f"{blob.digest}: cancelled"))
            raise
        except OSError as error:
            failure = ResourceExhausted(f"{blob.path}: {error}") if is_full(error) else error
            blob.fail(failure)
            raise failure from None
        except NodeAgentError as error:
            blob.fail(error)
            raise

    async def _receive(
        self, arrival: Arrival, descriptor: Descriptor, source: Source, attempt: int
    ) -> bool:
        """Receive from where the blob ends; False when it had to give way before the end."""
        blob = arrival.blob
        going = asyncio.timeout(None)
        give_way = partial(going.reschedule, 0)
        async with self._turns.taken(source, lambda: blob.received, give_way):
            try:
                async with going:
                    await self._take_in(arrival, source.blob(descriptor, attempt, blob.received))
            except TimeoutError:
                if going.expired():
                    return False
                raise
        return True

    async def _take_in(self, arrival: Arrival, stream: AsyncGenerator[bytes]) -> None:
        async with aclosing(stream) as chunks:
            async for chunk in chunks:
                self._counters.fetched_bytes += len(chunk)
                await to_the_end(self._writers, partial(arrival.blob.append, chunk))
                arrival.tell()

    def _forget(self, key: Key, arrival: Arrival) -> None:
        if self._arrivals.get(key) is arrival:
            del self._arrivals[key]


class Fetched:
    """The content of one image, fetched from a registry."""

    def __init__(self, downloads: Downloads, source: Source) -> None:
        self._downloads = downloads
        self._source = source

    @property
    def attempts(self) -> int:
        return self._source.attempts

    def origin(self, descriptor: Descriptor) -> Hashable:
        return (descriptor.digest, descriptor.size, self._source.places(descriptor))

    def open(self, descriptor: Descriptor, attempt: int) -> AbstractAsyncContextManager[Arrival]:
        return self._downloads.open(descriptor, self._source, attempt)
