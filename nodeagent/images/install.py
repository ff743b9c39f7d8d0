"""The way of an image's layers onto this node: fetched, unpacked while they arrive, completed from below, taken in.

Layers are unpacked side by side, each in a directory of its own; only their completion goes from the lowest up. Two
images that share a layer share the work for it.
"""

import asyncio
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from nodeagent.errors import DataLoss, InvalidArgument, Unsupported
from nodeagent.images import inheritance, layers
from nodeagent.images.budget import Budget, require_space
from nodeagent.images.concurrency import Flights, to_the_end
from nodeagent.images.content import Blob, BlobReader
from nodeagent.images.layer_store import LayerStore
from nodeagent.images.layers import Unpacked
from nodeagent.images.manifest import Descriptor, Image, Manifest
from nodeagent.images.staging import Staging
from nodeagent.images.usage import Counters
from nodeagent.records import Layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """max_image_*: of one image, unpacked. layers_at_once: over all images. private_redirects: also of registries at
    public addresses.
    """

    layers_at_once: int = 4
    max_image_bytes: int = 64 << 30
    max_image_entries: int = 2_000_000
    private_redirects: bool = True


class Arriving(Protocol):
    """A blob that is there as far as it is."""

    @property
    def blob(self) -> Blob: ...

    def complete(self) -> Awaitable[None]:
        """Return once it is verified; raises what went wrong."""


class Content(Protocol):
    """Where an image's blobs come from."""

    @property
    def attempts(self) -> int:
        """How many different answers there may be to the question for a blob."""

    def open(
        self, descriptor: Descriptor, attempt: int
    ) -> AbstractAsyncContextManager[Arriving]: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be installed. documents: what is kept of the image besides its layers, beginning with the index or
    manifest that its name stands for.
    """

    manifest_digest: str
    manifest: Manifest
    image: Image
    documents: tuple[bytes, ...]

    @property
    def image_id(self) -> str:
        return self.manifest.config.digest

    @property
    def chain_ids(self) -> tuple[str, ...]:
        return self.image.chain_ids

    @property
    def size_bytes(self) -> int:
        return self.manifest.config.size + sum(layer.size for layer in self.manifest.layers)


@dataclass(frozen=True, slots=True)
class _Job:
    plan: Plan
    chain_ids: tuple[str, ...]
    content: Content
    budget: Budget


class Installer:
    """Makes layers ready; recording them is left to the caller."""

    def __init__(
        self, store: LayerStore, staging: Staging, limits: Limits, counters: Counters
    ) -> None:
        self._store = store
        self._staging = staging
        self._limits = limits
        self._counters = counters
        self._flights: Flights[None] = Flights()
        self._slots = asyncio.Semaphore(limits.layers_at_once)
        # One thread for each slot: they wait for blobs to arrive.
        self._unpackers = ThreadPoolExecutor(limits.layers_at_once, "unpack")

    async def install(self, plan: Plan, content: Content) -> None:
        """Return with every layer of the plan in the store; the caller keeps them pinned. Raises as `unpack` does."""
        missing = self._missing(plan)
        if not missing:
            return
        directory = self._staging.directory
        require_space(directory, sum(layer.size for layer in missing.values()))
        budget = Budget(
            directory,
            max_bytes=self._limits.max_image_bytes,
            max_entries=self._limits.max_image_entries,
            blob_bytes=plan.size_bytes,
        )
        job = _Job(plan, plan.chain_ids, content, budget)
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(len(job.chain_ids)):
                    group.create_task(self._ensure(job, number))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def close(self) -> None:
        await self._flights.close()
        self._unpackers.shutdown()

    def _missing(self, plan: Plan) -> dict[str, Descriptor]:
        """The layers that are not here, by chain ID."""
        wanted = dict(zip(plan.chain_ids, plan.manifest.layers, strict=True))
        missing = {chain: layer for chain, layer in wanted.items() if chain not in self._store}
        present = [layer for chain, layer in wanted.items() if chain not in missing]
        self._counters.layers_skipped += len(present)
        self._counters.skipped_bytes += sum(layer.size for layer in present)
        return missing

    async def _ensure(self, job: _Job, number: int) -> None:
        chain_id = job.chain_ids[number]
        if chain_id not in self._store:
            await self._flights.join(chain_id, lambda: self._make(job, number), owner=job)

    async def _make(self, job: _Job, number: int) -> None:
        directory, unpacked = await self._unpack(job, number)
        try:
            if number:
                await self._ensure(job, number - 1)
            below = [self._store.path(chain) for chain in reversed(job.chain_ids[:number])]
            complete = partial(inheritance.complete, directory, unpacked, below, job.budget)
            await to_the_end(self._unpackers, complete)
            self._store.add(_record(job, number, unpacked), directory)
            self._counters.layers_fetched += 1
        except BaseException:
            self._staging.discard(directory)
            raise

    async def _unpack(self, job: _Job, number: int, attempt: int = 0) -> tuple[Path, Unpacked]:
        """A layer in a directory of its own. A server that sent wrong content is not asked again."""
        directory = self._staging.path("layer")
        try:
            return directory, await self._fetch_and_unpack(job, number, attempt, directory)
        except BaseException as error:
            self._staging.discard(directory)
            last = attempt + 1 == job.content.attempts
            if last or not isinstance(error, DataLoss):
                raise
        return await self._unpack(job, number, attempt + 1)

    async def _fetch_and_unpack(
        self, job: _Job, number: int, attempt: int, directory: Path
    ) -> Unpacked:
        descriptor = job.plan.manifest.layers[number]
        async with self._slots, job.content.open(descriptor, attempt) as arriving:
            reader = BlobReader(arriving.blob)
            diff_id = job.plan.image.diff_ids[number]
            unpack = partial(layers.unpack, reader, directory, diff_id, job.budget)
            try:
                unpacked = await to_the_end(self._unpackers, unpack, on_cancel=reader.stop)
            except (InvalidArgument, Unsupported):
                await arriving.complete()  # where the blob is another one, that is what went wrong
                raise
            await arriving.complete()
            return unpacked


def _record(job: _Job, number: int, unpacked: Unpacked) -> Layer:
    blob = job.plan.manifest.layers[number]
    return Layer(
        chain_id=job.chain_ids[number],
        diff_id=job.plan.image.diff_ids[number],
        blob=blob.digest,
        size_bytes=blob.size,
        used_bytes=unpacked.used_bytes,
        inodes=unpacked.inodes,
        opaque=unpacked.opaque,
    )
