"""Installation of an image's layers: fetched, unpacked while they arrive, completed from below, and stored.

Layers are unpacked in parallel, each in a directory of its own; only their completion goes from the lowest up. Two
images that share a layer share the work for it, but neither depends on the other's servers: a pull that waits in vain
for another one makes the layer itself, and whichever is ready first is used.
"""

import asyncio
from collections.abc import Awaitable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from nodeagent import disk_reserve
from nodeagent.errors import DataLoss, InvalidArgument, Unsupported
from nodeagent.images.budget import Budget, Share
from nodeagent.images.concurrency import Attempt, SharedWork
from nodeagent.images.content import Blob, BlobReader, Starved, sync_file_system
from nodeagent.images.layer_store import LayerStore
from nodeagent.images.manifest import Descriptor
from nodeagent.images.plan import Plan
from nodeagent.images.turns import Permits, Turns
from nodeagent.images.unpack import inheritance, layers, tree
from nodeagent.images.unpack.layers import Unpacked
from nodeagent.images.usage import Counters
from nodeagent.records import Layer
from nodeagent.tasks import Tasks, to_the_end
from nodeagent.trash import Trash

PATIENCE_SECONDS = 5.0  # with a layer that another pull makes

_UNPACKERS = 32  # threads; those that wait for bytes do not work
_WORTHWHILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits of pulls. layers_at_once: in one pull; also the number of threads that unpack, over all pulls.

    max_image_*: of one image, unpacked. private_redirects: also from registries at public addresses.
    """

    layers_at_once: int = 4
    max_image_bytes: int = 64 << 30
    max_image_entries: int = 2_000_000
    private_redirects: bool = True


class Arriving(Protocol):
    """A blob that is being fetched."""

    @property
    def blob(self) -> Blob: ...

    @property
    def is_complete(self) -> bool:
        """Whether all of it is there and verified."""

    def reaches(self, size_bytes: int) -> Awaitable[None]:
        """Wait until so much of it is there, or nothing more will come."""

    def complete(self) -> Awaitable[None]:
        """Wait until it is verified; raises the error that prevented it."""


class Content(Protocol):
    """The source of an image's blobs."""

    @property
    def attempts(self) -> int:
        """The number of sources that may have different content for a blob."""

    def origin(self, descriptor: Descriptor) -> Hashable:
        """A value that is equal for equal blobs from the same servers."""

    def open(
        self, descriptor: Descriptor, attempt: int
    ) -> AbstractAsyncContextManager[Arriving]: ...


class _Job:
    """One pull. turns: to fetch and unpack a layer; alone: layers for which waiting for another pull was in vain."""

    def __init__(self, plan: Plan, content: Content, budget: Budget, turns: int) -> None:
        self.plan = plan
        self.chain_ids = plan.chain_ids
        self.content = content
        self.budget = budget
        self.turns = asyncio.Semaphore(turns)
        self.arriving: dict[str, Arriving] = {}
        self.unpacked: dict[str, asyncio.Future[None]] = {}
        self.alone: set[str] = set()

    def descriptor(self, chain_id: str) -> Descriptor:
        return self.plan.manifest.layers[self.chain_ids.index(chain_id)]

    def origin(self, chain_id: str) -> Hashable:
        return self.content.origin(self.descriptor(chain_id))

    def received_bytes(self, chain_id: str) -> int:
        """The number of bytes of the layer's blob that have arrived."""
        arriving = self.arriving.get(chain_id)
        return arriving.blob.received if arriving else 0


class Installer:
    """The installer of layers, which the caller then records."""

    def __init__(
        self,
        store: LayerStore,
        staging: Trash,
        limits: Limits,
        counters: Counters,
        tasks: Tasks,
    ) -> None:
        self._store = store
        self._staging = staging
        self._limits = limits
        self._counters = counters
        self._making: SharedWork[None] = SharedWork(tasks, "layer")
        self._turns = Turns(_UNPACKERS)
        self._threads = ThreadPoolExecutor(_UNPACKERS, "unpack")
        self._permits = Permits(limits.layers_at_once)

    async def install(self, plan: Plan, content: Content) -> None:
        """Install every layer of the plan; the caller keeps them pinned. Raises as `unpack` does."""
        missing = self._missing(plan)
        if not missing:
            return
        directory = self._staging.directory
        disk_reserve.require_space(directory, sum(layer.size for layer in missing.values()))
        budget = Budget(
            directory,
            max_bytes=self._limits.max_image_bytes,
            max_entries=self._limits.max_image_entries,
            blob_bytes=plan.size_bytes,
        )
        job = _Job(plan, content, budget, self._limits.layers_at_once)
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(len(job.chain_ids)):
                    group.create_task(self._ensure(job, number))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def close(self) -> None:
        await self._making.close()
        self._threads.shutdown()

    def _missing(self, plan: Plan) -> dict[str, Descriptor]:
        """The layers that are not on the node, by chain ID."""
        wanted = dict(zip(plan.chain_ids, plan.manifest.layers, strict=True))
        missing = {chain: layer for chain, layer in wanted.items() if chain not in self._store}
        present = [layer for chain, layer in wanted.items() if chain not in missing]
        self._counters.layers_skipped += len(present)
        self._counters.skipped_bytes += sum(layer.size for layer in present)
        return missing

    # --- which pull makes a layer ---

    async def _ensure(self, job: _Job, number: int) -> None:
        """Wait until the layer is in the store, whichever pull makes it. The failure of another is not the job's."""
        chain_id = job.chain_ids[number]
        while chain_id not in self._store:
            attempt = self._under_way(job, chain_id)
            if attempt is None:
                await self._begin(job, number)
            elif attempt.owner is job:
                async with self._making.awaited(attempt):
                    await attempt.ended()
                attempt.result()
            else:
                await self._follow(job, chain_id, attempt)

    def _under_way(self, job: _Job, chain_id: str) -> Attempt[None] | None:
        """The job's own attempt, else another's, unless the job is to make the layer alone."""
        attempts = self._making.of(chain_id)
        ours = [attempt for attempt in attempts if attempt.owner is job]
        others = [] if chain_id in job.alone else attempts
        return next(iter([*ours, *others]), None)

    async def _begin(self, job: _Job, number: int) -> None:
        """Make a layer when its turn comes, the lowest first, unless another pull has begun by then."""
        chain_id = job.chain_ids[number]
        async with AsyncExitStack() as stack:
            async with job.turns:
                if chain_id in self._store or self._under_way(job, chain_id):
                    return
                job.unpacked[chain_id] = asyncio.get_running_loop().create_future()
                attempt = self._making.start(chain_id, self._make(job, number), job)
                await stack.enter_async_context(self._making.awaited(attempt))
                await attempt.ended(until=job.unpacked[chain_id])
            await attempt.ended()
        attempt.result()

    async def _follow(self, job: _Job, chain_id: str, attempt: Attempt[None]) -> None:
        """Wait for another pull's layer as long as that is likely to be faster; then have the job make it alone."""
        other = attempt.owner
        assert isinstance(other, _Job)
        async with self._making.awaited(attempt):
            before = other.received_bytes(chain_id)
            while not await attempt.ended(timeout_seconds=PATIENCE_SECONDS):
                if not _is_promising(job, other, chain_id, before):
                    break
                before = other.received_bytes(chain_id)
        job.alone.add(chain_id)

    # --- how it is made ---

    async def _make(self, job: _Job, number: int) -> None:
        chain_id = job.chain_ids[number]
        directory, unpacked = await self._fetch_and_unpack(job, number)
        try:
            job.unpacked[chain_id].set_result(None)
            if number:
                await self._ensure(job, number - 1)
            below = [self._store.path(chain) for chain in reversed(job.chain_ids[:number])]
            complete = partial(_complete, directory, unpacked, below, job.budget)
            async with self._turns.taken(job):
                digest = await to_the_end(self._threads, complete)
            if self._store.may_be_recorded(chain_id):
                sync = partial(sync_file_system, self._staging.directory)
                await to_the_end(self._threads, sync)
            if await self._store.add(_record(job, number, unpacked, digest), directory):
                self._counters.layers_fetched += 1
            else:
                self._staging.discard(directory)
        except BaseException:
            self._staging.discard(directory)
            raise

    async def _fetch_and_unpack(
        self, job: _Job, number: int, attempt: int = 0
    ) -> tuple[Path, Unpacked]:
        """Make a layer in a directory of its own. A server that sent wrong content is not asked again."""
        descriptor = job.plan.manifest.layers[number]
        try:
            with ExitStack() as undo:
                async with job.content.open(descriptor, attempt) as arriving:
                    job.arriving[job.chain_ids[number]] = arriving
                    directory, unpacked = await self._unpack(job, number, arriving)
                    undo.callback(self._staging.discard, directory)
                undo.pop_all()  # the end of the download may be cut off, or fail
                return directory, unpacked
        except DataLoss:
            if attempt + 1 == job.content.attempts:
                raise
        return await self._fetch_and_unpack(job, number, attempt + 1)

    async def _unpack(self, job: _Job, number: int, arriving: Arriving) -> tuple[Path, Unpacked]:
        """Unpack while the blob arrives. After giving way, start again only when twice as many bytes are there."""
        enough = 1
        while True:
            await arriving.reaches(enough)
            directory = self._staging.path("layer")
            share = Share(job.budget)
            try:
                return directory, await self._unpack_into(directory, job, number, arriving, share)
            except BaseException as error:
                self._staging.discard(directory)
                share.give_back()
                if not isinstance(error, Starved):
                    raise
            enough = 2 * max(arriving.blob.received, _WORTHWHILE_BYTES)

    async def _unpack_into(
        self, directory: Path, job: _Job, number: int, arriving: Arriving, budget: Budget
    ) -> Unpacked:
        reader = BlobReader(arriving.blob, self._permits)
        diff_id = job.plan.image.diff_ids[number]

        def unpack() -> Unpacked:
            with self._permits:
                return layers.unpack(reader, directory, diff_id, budget)

        try:
            async with self._turns.taken(job, lambda: reader.position, reader.give_way):
                unpacked = await to_the_end(self._threads, unpack, on_cancel=reader.stop)
        except (InvalidArgument, Unsupported):
            await arriving.complete()  # with wrong content that is the error to report
            raise
        await arriving.complete()
        return unpacked


def _is_promising(job: _Job, other: _Job, chain_id: str, before_bytes: int) -> bool:
    """Whether the job would take longer to make a layer than the other pull that is making it.

    Servers that the job does not use may be slow on purpose, so their progress says nothing. The same servers would
    serve the job no faster, unless they have stopped.
    """
    if other.unpacked[chain_id].done():
        return True  # it waits for the layers below, which the job lacks as well
    if job.origin(chain_id) != other.origin(chain_id):
        return False
    arriving = other.arriving.get(chain_id)
    complete = arriving is not None and arriving.is_complete
    return complete or other.received_bytes(chain_id) > before_bytes


def _complete(directory: Path, unpacked: Unpacked, below: Sequence[Path], budget: Budget) -> str:
    """Complete a layer from those below, and return the digest of its tree."""
    inheritance.complete(directory, unpacked, below, budget)
    return tree.digest(directory)


def _record(job: _Job, number: int, unpacked: Unpacked, digest: str) -> Layer:
    blob = job.plan.manifest.layers[number]
    return Layer(
        chain_id=job.chain_ids[number],
        diff_id=job.plan.image.diff_ids[number],
        blob=blob.digest,
        size_bytes=blob.size,
        used_bytes=unpacked.used_bytes,
        inodes=unpacked.inodes,
        opaque=unpacked.opaque,
        tree=digest,
    )
