"""The unpacked layers of this node, and removal of those that are not needed any more.

::

    unpacked in staging ── add ──► ready (in layers/, no record) ── recorded ──► recorded ── collect ──► gone

A layer is recorded after everything in it has been synced. What has no record when an agent starts never was. One
whose record cannot be read is of no use, but a container may run on it: it stays, until another one takes its place.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from nodeagent import files
from nodeagent.images.reference import is_digest
from nodeagent.records import Layer
from nodeagent.store import Store
from nodeagent.tasks import to_the_end
from nodeagent.trash import QUARANTINE, Trash, set_aside

log = logging.getLogger(__name__)


class LayerStore:
    """The directories ``layers/<chain ID>/`` and their sizes. Used from the event loop.

    A thread moves directories in and out, one at a time: their disk may be slow, or stand still (a snapshot).
    """

    def __init__(self, directory: Path, staging: Trash, store: Store) -> None:
        self._directory = directory
        self._staging = staging
        self._store = store
        self._pins: Counter[str] = Counter()
        self._thread = ThreadPoolExecutor(1, "layers")  # ends with this object
        self._moving = asyncio.Lock()
        files.ensure_directory(str(directory), mode=0o700)
        files.ensure_directory(str(_empty(directory)), mode=0o755)
        self._layers = {layer.chain_id: layer for layer in store.all(Layer)}
        self._recorded = set(self._layers)
        self._unreadable = set(store.unreadable(Layer))
        self._forgotten: set[str] = set()
        self._recover()

    @property
    def used_bytes(self) -> int:
        return sum(layer.used_bytes for layer in self._layers.values())

    @property
    def inodes(self) -> int:
        return sum(layer.inodes for layer in self._layers.values())

    def __contains__(self, chain_id: str) -> bool:
        return chain_id in self._layers

    def path(self, chain_id: str) -> Path:
        return _path(self._directory, chain_id)

    def stack(self, chain_ids: Sequence[str]) -> tuple[Path, ...]:
        return stack(self._directory, self._layers, chain_ids)

    async def add(self, layer: Layer, unpacked: Path) -> bool:
        """Move a complete layer in, which is not recorded yet; False where another pull was faster."""
        async with self._moving:
            if layer.chain_id in self._layers:
                return False
            is_in: list[bool] = []
            try:
                move = partial(self._move_in, layer.chain_id, unpacked, is_in)
                await to_the_end(self._thread, move)
            finally:  # also of a caller that was cancelled meanwhile
                if is_in:
                    self._layers[layer.chain_id] = layer
            return True

    def _move_in(self, chain_id: str, unpacked: Path, is_in: list[bool]) -> None:
        path = self.path(chain_id)
        if chain_id in self._unreadable:
            with suppress(FileNotFoundError):
                set_aside(path, self._directory.with_name(QUARANTINE))
            self._unreadable.discard(chain_id)
        unpacked.rename(path)
        is_in.append(True)

    def may_be_recorded(self, chain_id: str) -> bool:
        """Whether a power cut may bring a record of this layer back, whose removal has not been synced.

        What takes the layer's place must be synced before, or the record would stand for what is incomplete.
        """
        return chain_id in self._forgotten

    def unrecorded(self, chain_ids: Iterable[str]) -> list[Layer]:
        return [self._layers[chain] for chain in chain_ids if chain not in self._recorded]

    def recorded(self, layers: Iterable[Layer]) -> None:
        """Note that the store has these layers now."""
        self._recorded.update(layer.chain_id for layer in layers)

    @contextmanager
    def pinned(self, chain_ids: Collection[str]) -> Iterator[None]:
        """Keep these layers from being collected while the block runs, also those that are not there yet."""
        self._pins.update(chain_ids)
        try:
            yield
        finally:
            self._pins.subtract(chain_ids)
            self._pins += Counter()  # drops counts of 0

    async def collect(self, needed: Callable[[], Collection[str]]) -> None:
        """Remove every layer that is neither needed nor pinned when its turn comes."""
        async with self._moving:
            unneeded = self._layers.keys() - set(needed()) - self._pins.keys()
            # The records first: a crash in between leaves directories without a record, which the next start removes.
            with self._store.transaction():
                for chain_id in unneeded:
                    self._store.delete(Layer, chain_id)
            self._forgotten |= unneeded & self._recorded
            self._recorded -= unneeded
            # From now on a pull makes them anew, and waits with them.
            leaving = {chain_id: self._layers.pop(chain_id) for chain_id in unneeded}
            moved: list[Path] = []
            try:
                await to_the_end(self._thread, partial(self._move_out, leaving, moved))
            finally:
                for path in moved:
                    self._staging.discard(path)
                self._layers.update(leaving)  # what could not be moved is tried again

    def _move_out(self, leaving: dict[str, Layer], moved: list[Path]) -> None:
        """Move layers to the staging directory; what is left in `leaving` could not be moved."""
        for chain_id in list(leaving):
            path = self._staging.move(self.path(chain_id))
            if path is not None:
                moved.append(path)
            del leaving[chain_id]

    def _recover(self) -> None:
        names = (f"sha256:{path.name}" for path in self._directory.iterdir())
        present = {name for name in names if is_digest(name)}
        for chain_id in self._layers.keys() - present:
            log.warning("layer %s: missing in %s; its record is dropped", chain_id, self._directory)
            self._store.delete(Layer, chain_id)
            del self._layers[chain_id]
            self._recorded.discard(chain_id)
            self._forgotten.add(chain_id)
        for chain_id in present - self._layers.keys() - self._unreadable:
            self._staging.take(self.path(chain_id))


def stack(
    directory: Path, layers: Mapping[str, Layer], chain_ids: Sequence[str]
) -> tuple[Path, ...]:
    """The directories of these layers, given lowest first: uppermost first, down to one that hides the rest.

    An overlay needs at least one of them: without layers it is an empty directory.
    """
    visible = [] if chain_ids else [_empty(directory)]
    for chain_id in reversed(chain_ids):
        visible.append(_path(directory, chain_id))
        if chain_id in layers and layers[chain_id].opaque:
            break
    return tuple(visible)


def _path(directory: Path, chain_id: str) -> Path:
    return directory / chain_id.removeprefix("sha256:")


def _empty(directory: Path) -> Path:
    return directory.with_name("empty")
