"""The images of this node, and the CRI's operations on them.

An image is known by the digest of its config. Names are tags, which move, and digests of manifests, which don't. Layers
belong to all images that have them and to the containers that hold them; they are removed with the last of these.

Everything is used from one event loop; what blocks runs in threads, and their number is bounded.
"""

import asyncio
import logging
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import BinaryIO, Self

from nodeagent.errors import NotFound, ResourceExhausted, Unavailable
from nodeagent.images import archive, manifest
from nodeagent.images.concurrency import SharedWork
from nodeagent.images.content import Documents, sync_file_system
from nodeagent.images.holds import Holds
from nodeagent.images.image_store import ImageStore, documents, title
from nodeagent.images.install import Content, Installer, Limits
from nodeagent.images.layer_store import LayerStore
from nodeagent.images.plan import Plan
from nodeagent.images.reference import Reference, parse
from nodeagent.images.remote.auth import Auth
from nodeagent.images.remote.client import Session
from nodeagent.images.remote.destinations import Scope
from nodeagent.images.remote.download import Downloads
from nodeagent.images.remote.resolve import resolve
from nodeagent.images.remote.source import open_source
from nodeagent.images.usage import Counters, FsUsage
from nodeagent.records import Image, ImageHold
from nodeagent.store import Store
from nodeagent.tasks import Tasks, to_the_end
from nodeagent.trash import Trash

__all__ = ["Auth", "Counters", "FsUsage", "Images", "Limits"]

log = logging.getLogger(__name__)

_WRITERS = 4
_THREADS = 4
_LOADERS = 2


class Images:
    """The images of a node, opened with `Images.open`; `counters` are for metrics."""

    def __init__(
        self,
        root: Path,
        store: Store,
        hosts_dir: Path,
        pinned: Collection[str],
        limits: Limits,
        session: Session,
        tasks: Tasks,
        resources: AsyncExitStack,
    ) -> None:
        self.counters = Counters()
        self._root = root
        self._store = store
        self._hosts_dir = hosts_dir
        self._limits = limits
        self._resources = resources
        self._documents = Documents(root / "blobs/sha256")
        self._staging = Trash(root / "staging", "staging", tasks)
        resources.push_async_callback(self._staging.close)
        self._layers = LayerStore(root / "layers", self._staging, store)
        # Not the event loop's own threads, which the whole agent shares: a sync may last, an archive takes minutes.
        self._threads = ThreadPoolExecutor(_THREADS, "images")
        resources.callback(self._threads.shutdown)
        self._removing = ThreadPoolExecutor(1, "documents")
        resources.callback(self._removing.shutdown)
        self._loaders = ThreadPoolExecutor(_LOADERS, "archive")
        resources.callback(self._loaders.shutdown)
        writers = ThreadPoolExecutor(_WRITERS, "blob")
        resources.callback(writers.shutdown)
        self._downloads = Downloads(self._staging, writers, self.counters, tasks)
        self._session = session
        self._installer = Installer(self._layers, self._staging, limits, self.counters, tasks)
        resources.push_async_callback(self._installer.close)
        self._pulls: SharedWork[Image] = SharedWork(tasks, "pull")
        resources.push_async_callback(self._pulls.close)
        self._images = ImageStore(store, pinned)
        self._holds = Holds(store)
        # Images with changes that are not known to be synced, by id: a pull may fail or be cancelled before its sync.
        self._unsynced: dict[str, object] = {}
        self._owes_removal = False
        self._collecting = asyncio.Lock()  # no document comes meanwhile

    @classmethod
    async def open(
        cls,
        *,
        root: Path,
        store: Store,
        hosts_dir: Path,
        session: Session,
        tasks: Tasks,
        pinned: Collection[str] = (),
        limits: Limits | None = None,
    ) -> Self:
        """Open the images below `root` (blobs/, layers/, empty/, staging/) and drop what a crash left incomplete.

        session: the node's, which all that pulls shares; whoever opened it closes it afterwards, as tasks.
        """
        async with AsyncExitStack() as resources:
            images = cls(
                root, store, hosts_dir, pinned, limits or Limits(), session, tasks, resources
            )
            await images._recover()
            images._resources = resources.pop_all()
            return images

    async def close(self) -> None:
        """Cancel all pulls and loads, which undo themselves."""
        await self._resources.aclose()

    # --- looking up ---

    def find(self, name_or_id: str) -> Image | None:
        """Find an image by name, digest, ID, or a prefix of the ID that no other image has."""
        return self._images.find(name_or_id)

    def list(self) -> list[Image]:
        """All images, the oldest first."""
        return sorted(self._images, key=lambda image: image.pulled_at)

    def lower_dirs(self, image: Image) -> tuple[Path, ...]:
        """The image's layers, uppermost first, as an overlay mount takes them."""
        return self._layers.stack(image.layers)

    async def usage(self) -> FsUsage:
        return FsUsage(
            mountpoint=str(self._root),
            used_bytes=self._layers.used_bytes + self._documents.used_bytes,
            inodes_used=self._layers.inodes + len(self._documents),
        )

    # --- pulling and loading ---

    async def pull(self, reference: str, auth: Auth | None = None) -> Image:
        """Pull the image that the registry has under this name at present.

        Two callers with the same credentials share the work; the cancellation of one does not end the other's.
        Raises InvalidArgument, NotFound, PermissionDenied, RegistryUnavailable, DataLoss, ResourceExhausted,
        Unsupported; nothing of the image is kept then, except layers that a retry will need.
        """
        name = parse(reference)
        return await self._pulls.join((name, auth), lambda: self._pull(name, auth))

    async def load(self, source: Path | BinaryIO) -> Sequence[Image]:
        """Load all images for this platform from a tar file; see `archive`."""
        directory = self._staging.path("archive")
        try:
            spool = partial(archive.spool, source, directory, self._limits.max_image_bytes)
            contents = await to_the_end(self._loaders, spool)
            images = await to_the_end(self._loaders, contents.images)
            taken = [await self._load(loaded, contents) for loaded in images]
            return list({image.id: image for image in taken}.values())
        finally:
            self._staging.discard(directory)

    async def _pull(self, name: Reference, auth: Auth | None) -> Image:
        self.counters.pulls_in_progress += 1
        outcome = "failure"
        try:
            floor = Scope.PRIVATE if self._limits.private_redirects else Scope.PUBLIC
            source = await open_source(self._session, name, auth, self._hosts_dir, floor)
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
                self._note_platform(plan, (*tags, *digests))
                return await self._publish(plan, tags, digests)
        except (Unavailable, asyncio.CancelledError):
            raise  # the layers that are complete stay for the next attempt
        except ResourceExhausted:
            await self._collect()
            await self._staging.emptied()
            raise
        except BaseException:
            await self._collect()
            raise

    def _note_platform(self, plan: Plan, names: Collection[str]) -> None:
        """Warn of an image for another platform, which its index may offer for this one, or binfmt_misc may run."""
        platform = plan.image.platform
        if not manifest.is_for_this_node(platform) and plan.image_id not in self._images:
            log.warning(
                "image %s: its config names %s, this node is %s; taken as it is",
                next(iter(names), plan.image_id),
                platform,
                manifest.PLATFORM,
            )

    async def _publish(self, plan: Plan, tags: Collection[str], digests: Collection[str]) -> Image:
        """Record the image with its new layers; all of it survives a power cut on return."""
        # Synced before they are recorded: the store's record may survive a power cut that the layer does not.
        if self._layers.unrecorded(plan.chain_ids):
            await self._sync()
        layers = self._layers.unrecorded(plan.chain_ids)
        image = self._images.named(plan, tags, digests)
        changed = self._images.put(image, layers)
        self._layers.recorded(layers)
        if changed:
            self._unsynced[image.id] = object()
        owed = self._unsynced.get(image.id)
        await self._store.settled()
        async with self._collecting:
            missing = [data for data in plan.documents if not self._documents.has(data)]
            if missing:
                owed = self._unsynced.setdefault(image.id, object())
            for data in missing:
                await to_the_end(self._threads, partial(self._documents.put, data))
        if owed is not None:
            await self._sync()
            if self._unsynced.get(image.id) is owed:
                del self._unsynced[image.id]
        return image

    async def _sync(self) -> None:
        await to_the_end(self._threads, partial(sync_file_system, self._root))

    # --- removing ---

    async def remove(self, name_or_id: str) -> None:
        """Remove the image with all its names. Succeeds where there is none.

        Its layers are removed in the background, those that containers hold with the last of these.
        """
        image = self.find(name_or_id)
        if image is not None:
            self._images.drop(image)
            self._unsynced.pop(image.id, None)
        if image is not None or self._owes_removal:
            await self._collect()

    def hold(self, image_id: str, holder: str) -> None:
        """Keep the image's layers for as long as `holder` exists, even if the image is removed. Durable; idempotent.

        Raises NotFound for an image that was removed meanwhile, and which the holder does not hold: its layers may be
        there still, because another image has them, and would be removed with that one.
        """
        image = self._images.get(image_id)
        if image is not None:
            self._holds.add(image, holder)
        elif not any((hold.image_id, hold.holder) == (image_id, holder) for hold in self._holds):
            raise NotFound(f'image "{image_id}": was removed meanwhile; pull it again')

    async def release(self, holder: str) -> None:
        """Drop all holds of `holder`."""
        were_known = self._holds.are_known
        released = self._holds.remove(holder)
        is_last = any(hold.image_id not in self._images for hold in released)
        if is_last or not were_known or self._owes_removal:
            await self._collect()

    @property
    def holders(self) -> set[str]:
        """The containers that hold images."""
        return self._holds.holders

    async def release_others(self, holders: Collection[str]) -> None:
        """Drop the holds of all but these holders, which a crash may have left."""
        for holder in self._holds.holders - set(holders):
            await self.release(holder)

    async def _collect(self) -> None:
        """Remove layers and documents that nothing refers to. What fails, the next removal of anything makes up for."""
        self._owes_removal = True
        async with self._collecting:
            self._owes_removal = False
            try:
                if self._holds.are_known:
                    await self._layers.collect(self._needed)
                wanted = {digest for image in self._images for digest in documents(image)}
                await to_the_end(self._removing, partial(self._documents.keep, wanted))
            except BaseException:
                self._owes_removal = True
                raise

    def _needed(self) -> set[str]:
        owners: list[Image | ImageHold] = [*self._images, *self._holds]
        return {chain for owner in owners for chain in owner.layers}

    async def _recover(self) -> None:
        """Drop images that lack a layer; their other layers are kept for the pull that will follow."""
        self._documents.drop_damaged()
        complete = True
        for image in self._images:
            missing = [chain for chain in image.layers if chain not in self._layers]
            if missing:
                complete = False
                log.warning(
                    "image %s: layer %s is missing; the image is dropped, pull it again",
                    title(image),
                    missing[0],
                )
                self._images.drop(image)
        if complete:
            await self._collect()
