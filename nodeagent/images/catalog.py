"""The images of this node: what the CRI's image verbs mean.

An image is known by the digest of its config. Names are tags, which move, and digests of manifests, which don't. Layers
belong to all images that have them and to the containers that hold them; they go with the last of these.

Everything is used from one event loop; what blocks runs in threads, and their number is bounded.
"""

import asyncio
import logging
import os
import time
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import BinaryIO, Self

import msgspec

from nodeagent.errors import InvalidArgument, ResourceExhausted, Unavailable
from nodeagent.images import archive, manifest
from nodeagent.images.auth import Auth
from nodeagent.images.concurrency import Flights, to_the_end
from nodeagent.images.content import Documents
from nodeagent.images.download import Downloads
from nodeagent.images.install import Content, Installer, Limits, Plan
from nodeagent.images.layer_store import LayerStore
from nodeagent.images.pull import resolve
from nodeagent.images.reference import Reference, id_prefix, parse
from nodeagent.images.registry import open_session
from nodeagent.images.source import open_source
from nodeagent.images.staging import Staging
from nodeagent.images.usage import Counters, FsUsage
from nodeagent.linux import syscalls
from nodeagent.records import Image, ImageHold
from nodeagent.store import Store

__all__ = ["Auth", "Counters", "FsUsage", "Images", "Limits"]

log = logging.getLogger(__name__)

_WRITERS = 4


class Images:
    """Opened with `Images.open`; `counters` are for metrics."""

    def __init__(
        self,
        root: Path,
        store: Store,
        hosts_dir: Path,
        pinned: Collection[str],
        limits: Limits,
        resources: AsyncExitStack,
    ) -> None:
        self.counters = Counters()
        self._root = root
        self._store = store
        self._hosts_dir = hosts_dir
        self._pinned = [_normal_pattern(pattern) for pattern in pinned]
        self._limits = limits
        self._resources = resources
        self._documents = Documents(root / "blobs/sha256")
        self._staging = Staging(root / "staging")
        resources.push_async_callback(self._staging.close)
        self._layers = LayerStore(root / "layers", self._staging, store)
        self._installer = Installer(self._layers, self._staging, limits, self.counters)
        resources.push_async_callback(self._installer.close)
        writers = ThreadPoolExecutor(_WRITERS, "blob")
        resources.callback(writers.shutdown)
        self._downloads = Downloads(self._staging, writers, self.counters)
        self._session = open_session()
        resources.push_async_callback(self._session.close)
        self._pulls: Flights[Image] = Flights()
        resources.push_async_callback(self._pulls.close)
        self._images: dict[str, Image] = {}
        self._names: dict[str, str] = {}
        self._holds = {hold.key: hold for hold in store.all(ImageHold)}

    @classmethod
    async def open(
        cls,
        *,
        root: Path,
        store: Store,
        hosts_dir: Path,
        pinned: Collection[str] = (),
        limits: Limits | None = None,
    ) -> Self:
        """The images below `root` (blobs/, layers/, staging/). What a crash left half done is dropped."""
        async with AsyncExitStack() as resources:
            images = cls(root, store, hosts_dir, pinned, limits or Limits(), resources)
            images._recover()
            images._resources = resources.pop_all()
            return images

    async def close(self) -> None:
        """End what goes on; each piece undoes itself."""
        await self._resources.aclose()

    # --- looking up ---

    def find(self, name_or_id: str) -> Image | None:
        """By name, by digest, by ID, or by a part of the ID that only one image begins with."""
        digits = id_prefix(name_or_id)
        if digits and (image := self._images.get(f"sha256:{digits}")):
            return image
        try:
            name = str(parse(name_or_id))
        except InvalidArgument:
            name = ""
        if name in self._names:
            return self._images[self._names[name]]
        return self._by_prefix(digits) if digits else None

    def list(self) -> list[Image]:
        """In the order in which they came."""
        return sorted(self._images.values(), key=lambda image: image.pulled_at)

    def lower_dirs(self, image: Image) -> tuple[Path, ...]:
        """The image's layers, uppermost first, as an overlay mount takes them."""
        return self._layers.stack(image.layers)

    async def usage(self) -> FsUsage:
        return FsUsage(
            mountpoint=str(self._root),
            used_bytes=self._layers.used_bytes + self._documents.used_bytes,
            inodes_used=self._layers.inodes + len(self._documents),
        )

    def _by_prefix(self, digits: str) -> Image | None:
        matches = [key for key in self._images if key.startswith(f"sha256:{digits}")]
        return self._images[matches[0]] if len(matches) == 1 else None

    # --- coming ---

    async def pull(self, reference: str, auth: Auth | None = None) -> Image:
        """Make the image that the registry has under this name the one that we have.

        Two callers with the same credentials share the work, and the end of one's patience is not the other's.
        Raises InvalidArgument, NotFound, PermissionDenied, RegistryUnavailable, DataLoss, ResourceExhausted,
        Unsupported; nothing of the image is then here, except layers that a retry will need.
        """
        name = parse(reference)
        return await self._pulls.join((name, auth), lambda: self._pull(name, auth))

    async def load(self, source: Path | BinaryIO) -> Sequence[Image]:
        """Take in all images of a tar file for this platform; see `archive`."""
        directory = self._staging.path("archive")
        try:
            spool = partial(archive.spool, source, directory, self._limits.max_image_bytes)
            contents = await to_the_end(None, spool)
            images = await asyncio.to_thread(contents.images)
            taken = [await self._load(loaded, contents) for loaded in images]
            return list({image.id: image for image in taken}.values())
        finally:
            self._staging.discard(directory)

    async def _pull(self, name: Reference, auth: Auth | None) -> Image:
        self.counters.pulls_in_progress += 1
        outcome = "failure"
        try:
            source = await open_source(self._session, name, auth, self._hosts_dir)
            plan = await resolve(source, self._documents)
            tags = [] if name.digest else [str(name)]
            digests = [f"{name.name}@{manifest.digest(plan.documents[0])}"]
            image = await self._take_in(plan, self._downloads.of(source), tags, digests)
            outcome = "success"
            return image
        finally:
            self.counters.pulls_in_progress -= 1
            self.counters.pulls[outcome] += 1

    async def _load(self, loaded: archive.Loaded, contents: archive.Archive) -> Image:
        tags = [str(name) for name in loaded.names if name.tag]
        digests = [f"{name.name}@{loaded.digest}" for name in loaded.names if loaded.digest]
        return await self._take_in(loaded.plan, contents, tags, digests)

    async def _take_in(
        self, plan: Plan, content: Content, tags: Collection[str], digests: Collection[str]
    ) -> Image:
        try:
            with self._layers.pinned(plan.chain_ids):
                await self._installer.install(plan, content)
                return await self._publish(plan, tags, digests)
        except (Unavailable, asyncio.CancelledError):
            raise  # the layers that are complete stay for the next attempt
        except ResourceExhausted:
            self._collect()
            await self._staging.emptied()
            raise
        except BaseException:
            self._collect()
            raise

    async def _publish(self, plan: Plan, tags: Collection[str], digests: Collection[str]) -> Image:
        """Layers are synced, then recorded together with the image; all of it survives a power cut on return."""
        if self._layers.unrecorded(plan.chain_ids):
            await self._sync()
        layers = self._layers.unrecorded(plan.chain_ids)
        old = self._images.get(plan.image_id)
        image = self._merged(plan, old, tags, digests)
        moved = [_without(other, tags) for other in self._images.values() if other.id != image.id]
        changed = [new for new in moved if new != self._images[new.id]]
        if image != old:
            changed.append(image)
        with self._store.transaction():
            self._layers.record(layers)
            for record in changed:
                self._store.put(record)
        self._images.update((record.id, record) for record in changed)
        self._index()
        missing = [data for data in plan.documents if not self._documents.has(data)]
        for data in missing:
            await to_the_end(None, partial(self._documents.put, data))
        if layers or changed or missing:
            await self._sync()
        return image

    def _merged(
        self, plan: Plan, old: Image | None, tags: Iterable[str], digests: Iterable[str]
    ) -> Image:
        """The image with the names that it has and those that it gets."""
        all_tags = tuple(dict.fromkeys((*(old.repo_tags if old else ()), *tags)))
        all_digests = tuple(dict.fromkeys((*(old.repo_digests if old else ()), *digests)))
        return Image(
            id=plan.image_id,
            repo_tags=all_tags,
            repo_digests=all_digests,
            manifest=plan.manifest_digest,
            layers=plan.chain_ids,
            size_bytes=plan.size_bytes,
            config=plan.image.config,
            pulled_at=old.pulled_at if old else time.time_ns(),
            pinned=self._is_pinned((*all_tags, *all_digests)),
        )

    async def _sync(self) -> None:
        await to_the_end(None, partial(_sync_file_system, self._root))

    # --- going ---

    async def remove(self, name_or_id: str) -> None:
        """Take the image out with all its names; one that is not there is out already.

        Its layers go behind the requests, those that containers hold with the last of these.
        """
        image = self.find(name_or_id)
        if image is None:
            return
        self._store.delete(Image, image.id)
        del self._images[image.id]
        self._index()
        self._collect()

    def hold(self, image_id: str, holder: str) -> None:
        """Keep the image's layers for as long as `holder` exists, even if the image is removed. Durable; idempotent."""
        image = self._images.get(image_id)
        if image is None:
            return
        hold = ImageHold(holder=holder, image_id=image_id, layers=image.layers)
        if self._holds.get(hold.key) != hold:
            self._store.put(hold)
            self._holds[hold.key] = hold

    def release(self, holder: str) -> None:
        """`holder` needs none of its images any more."""
        released = [hold for hold in self._holds.values() if hold.holder == holder]
        for hold in released:
            self._store.delete(ImageHold, hold.key)
            del self._holds[hold.key]
        if any(hold.image_id not in self._images for hold in released):
            self._collect()

    def _collect(self) -> None:
        """Drop layers and documents that nothing refers to."""
        owners: list[Image | ImageHold] = [*self._images.values(), *self._holds.values()]
        self._layers.collect({chain for owner in owners for chain in owner.layers})
        self._documents.keep(
            {digest for image in self._images.values() for digest in _documents(image)}
        )

    # --- state ---

    def _recover(self) -> None:
        """An image that lacks a layer is dropped; those that it has are kept for the pull that will follow."""
        complete = True
        for image in self._store.all(Image):
            missing = [chain for chain in image.layers if chain not in self._layers]
            if missing:
                complete = False
                log.warning("image %s lacks %s: dropped, pull it again", _title(image), missing[0])
                self._store.delete(Image, image.id)
                continue
            pinned = self._is_pinned((*image.repo_tags, *image.repo_digests))
            self._images[image.id] = msgspec.structs.replace(image, pinned=pinned)
        self._index()
        if complete:
            self._collect()

    def _index(self) -> None:
        self._names = {
            name: image.id
            for image in self._images.values()
            for name in (*image.repo_digests, *image.repo_tags)
        }

    def _is_pinned(self, names: Iterable[str]) -> bool:
        return any(fnmatchcase(name, pattern) for name in names for pattern in self._pinned)


def _without(image: Image, tags: Collection[str]) -> Image:
    kept = tuple(tag for tag in image.repo_tags if tag not in tags)
    return msgspec.structs.replace(image, repo_tags=kept)


def _documents(image: Image) -> Iterable[str]:
    return (image.id, image.manifest, *(name.rpartition("@")[2] for name in image.repo_digests))


def _title(image: Image) -> str:
    return (image.repo_tags or image.repo_digests or (image.id,))[0]


def _normal_pattern(pattern: str) -> str:
    try:
        return str(parse(pattern))
    except InvalidArgument:
        return pattern


def _sync_file_system(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syscalls.syncfs(descriptor)
    finally:
        os.close(descriptor)
