"""The unpacked layers of this node, and removal of those that are not needed any more.

::

    unpacked in staging ── add ──► ready (in layers/, no record) ── recorded ──► recorded ── collect ──► gone

A layer is recorded after everything in it has been synced. What has no record when an agent starts never was. One
whose record cannot be read is of no use, but a container may run on it: it stays, until another one takes its place.
"""

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from nodeagent import files
from nodeagent.images.reference import is_digest
from nodeagent.records import Layer
from nodeagent.store import Store
from nodeagent.trash import QUARANTINE, Trash, set_aside

log = logging.getLogger(__name__)


class LayerStore:
    """The directories ``layers/<chain ID>/`` and their sizes. Used from the event loop; no call blocks for long."""

    def __init__(self, directory: Path, staging: Trash, store: Store) -> None:
        self._directory = directory
        self._staging = staging
        self._store = store
        self._pins: Counter[str] = Counter()
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

    def add(self, layer: Layer, unpacked: Path) -> None:
        """Move a complete layer in; it is not recorded yet."""
        path = self.path(layer.chain_id)
        if layer.chain_id in self._unreadable:
            self._unreadable.discard(layer.chain_id)
            with suppress(FileNotFoundError):
                set_aside(path, self._directory.with_name(QUARANTINE))
        unpacked.rename(path)
        self._layers[layer.chain_id] = layer

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

    def collect(self, needed: Collection[str]) -> None:
        """Remove every layer that is neither needed nor pinned."""
        unneeded = self._layers.keys() - set(needed) - self._pins.keys()
        # The records first: a crash in between leaves directories without a record, which the next start removes.
        with self._store.transaction():
            for chain_id in unneeded:
                self._store.delete(Layer, chain_id)
        self._forgotten |= unneeded & self._recorded
        for chain_id in unneeded:
            self._recorded.discard(chain_id)
            self._staging.take(self.path(chain_id))
            del self._layers[chain_id]  # only now: one that could not be moved is tried again

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
