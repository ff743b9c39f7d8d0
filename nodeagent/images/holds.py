"""Holds: which containers need which layers, even of removed images. They are durable, as an agent may be killed.

What a hold keeps that cannot be read is not known: as long as its container exists, no layer is known to be unneeded.
"""

from collections.abc import Iterator

from nodeagent.records import Image, ImageHold
from nodeagent.store import Store


class Holds:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._holds = {hold.key: hold for hold in store.all(ImageHold)}
        self._unreadable = set(store.unreadable(ImageHold))

    def __iter__(self) -> Iterator[ImageHold]:
        return iter(self._holds.values())

    @property
    def holders(self) -> set[str]:
        return {hold.holder for hold in self} | {_holder(key) for key in self._unreadable}

    @property
    def are_known(self) -> bool:
        """Whether every hold could be read."""
        return not self._unreadable

    def add(self, image: Image, holder: str) -> None:
        """Add a hold, if it is not there. One holder may need several images."""
        hold = ImageHold(holder=holder, image_id=image.id, layers=image.layers)
        if self._holds.get(hold.key) != hold:
            self._store.put(hold)
            self._holds[hold.key] = hold

    def remove(self, holder: str) -> list[ImageHold]:
        """Remove and return all holds of a holder."""
        for key in [key for key in self._unreadable if _holder(key) == holder]:
            self._store.delete(ImageHold, key)
            self._unreadable.discard(key)
        removed = [hold for hold in self if hold.holder == holder]
        for hold in removed:
            self._store.delete(ImageHold, hold.key)
            del self._holds[hold.key]
        return removed


def _holder(key: str) -> str:
    return key.partition("/")[0]
