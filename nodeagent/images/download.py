"""Blobs from registries into files: each is fetched once for an image, however many of its layers it is.

Images share layers, not blobs: what one's servers and credentials make of a blob is not the other's affair.
"""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial

from nodeagent.errors import NodeAgentError, ResourceExhausted, Unavailable
from nodeagent.images.budget import is_full
from nodeagent.images.concurrency import ended, to_the_end
from nodeagent.images.content import Blob
from nodeagent.images.manifest import Descriptor
from nodeagent.images.source import Source
from nodeagent.images.staging import Staging
from nodeagent.images.usage import Counters

Key = tuple[Source, str, int]


@dataclass(slots=True)
class Arrival:
    """A blob that arrives, or has arrived. task: what fetches it."""

    blob: Blob
    task: "asyncio.Task[None]"
    users: int = 0

    async def complete(self) -> None:
        """Return once all of it is there and verified; raises what went wrong."""
        await asyncio.wait([self.task])
        self.task.result()


class Downloads:
    """The blobs that are being fetched. writers: threads for writing and hashing, never for waiting."""

    def __init__(self, staging: Staging, writers: Executor, counters: Counters) -> None:
        self._staging = staging
        self._writers = writers
        self._counters = counters
        self._arrivals: dict[Key, Arrival] = {}

    def of(self, source: Source) -> "Fetched":
        return Fetched(self, source)

    @asynccontextmanager
    async def open(
        self, descriptor: Descriptor, source: Source, attempt: int
    ) -> AsyncIterator[Arrival]:
        """The arriving blob; its file goes with the last who has it open."""
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
                self._forget(key, arrival)
                arrival.task.cancel()
                await ended(arrival.task)
                arrival.blob.remove()

    def _start(self, key: Key, descriptor: Descriptor) -> Arrival:
        blob = Blob(self._staging.path("blob"), descriptor.digest, descriptor.size)
        arrival = Arrival(blob, asyncio.create_task(self._fetch(blob, descriptor, key)))
        arrival.task.add_done_callback(lambda _task: self._landed(key, arrival))
        return arrival

    def _landed(self, key: Key, arrival: Arrival) -> None:
        """A failure is for those who wait now; whoever comes later tries anew."""
        if arrival.task.cancelled() or arrival.task.exception():
            self._forget(key, arrival)

    async def _fetch(self, blob: Blob, descriptor: Descriptor, key: Key) -> None:
        source, _, attempt = key
        try:
            async with aclosing(source.blob(descriptor, attempt)) as chunks:
                async for chunk in chunks:
                    self._counters.fetched_bytes += len(chunk)
                    await to_the_end(self._writers, partial(blob.append, chunk))
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

    def _forget(self, key: Key, arrival: Arrival) -> None:
        if self._arrivals.get(key) is arrival:
            del self._arrivals[key]


class Fetched:
    """The content of one image, out of a registry."""

    def __init__(self, downloads: Downloads, source: Source) -> None:
        self._downloads = downloads
        self._source = source

    @property
    def attempts(self) -> int:
        return self._source.attempts

    def open(self, descriptor: Descriptor, attempt: int) -> AbstractAsyncContextManager[Arrival]:
        return self._downloads.open(descriptor, self._source, attempt)
