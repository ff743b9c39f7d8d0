"""The records of images, and the names that lead to them."""

import time
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatchcase

import msgspec

from nodeagent.errors import InvalidArgument
from nodeagent.images.plan import Plan
from nodeagent.images.reference import id_prefix, parse
from nodeagent.records import Image, Layer
from nodeagent.store import Store


class ImageStore:
    """The images in memory, which agree with the store: what could not be written is not in memory either.

    pinned: patterns of names, * for any text; one without it is a name as a user writes it.
    """

    def __init__(self, store: Store, pinned: Iterable[str]) -> None:
        self._store = store
        self._pinned = [_normal_pattern(pattern) for pattern in pinned]
        images = (self._with_pin(image) for image in store.all(Image))
        self._images = {image.id: image for image in images}
        self._ids: dict[str, str] = {}
        self._index()

    def __iter__(self) -> Iterator[Image]:
        return iter(list(self._images.values()))

    def __contains__(self, image_id: str) -> bool:
        return image_id in self._images

    def get(self, image_id: str) -> Image | None:
        return self._images.get(image_id)

    def find(self, text: str) -> Image | None:
        """Find an image by name, digest, ID, or a prefix of the ID that no other image has."""
        digits = id_prefix(text)
        if digits and (image := self.get(f"sha256:{digits}")):
            return image
        try:
            name = str(parse(text))
        except InvalidArgument:
            name = ""
        if name in self._ids:
            return self._images[self._ids[name]]
        return self._only(digits) if digits else None

    def named(self, plan: Plan, tags: Iterable[str], digests: Iterable[str]) -> Image:
        """The image of a plan, with these names besides those that it has already."""
        old = self.get(plan.image_id)
        new = Image(
            id=plan.image_id,
            repo_tags=_joined(old.repo_tags if old else (), tags),
            repo_digests=_joined(old.repo_digests if old else (), digests),
            manifest=plan.manifest_digest,
            layers=plan.chain_ids,
            size_bytes=plan.size_bytes,
            config=plan.image.config,
            pulled_at=old.pulled_at if old else time.time_ns(),
        )
        return self._with_pin(new)

    def put(self, image: Image, layers: Collection[Layer]) -> bool:
        """Record an image together with its new layers; its tags are taken from the images that had them.

        Returns whether that changed anything.
        """
        changed = [new for old in self if (new := self._without(old, image)) != old]
        if image != self.get(image.id):
            changed.append(image)
        with self._store.transaction():
            for record in (*layers, *changed):
                self._store.put(record)
        self._images.update((record.id, record) for record in changed)
        self._index()
        return bool(layers or changed)

    def drop(self, image: Image) -> None:
        self._store.delete(Image, image.id)
        del self._images[image.id]
        self._index()

    def _only(self, digits: str) -> Image | None:
        matches = [image for image in self if image.id.startswith(f"sha256:{digits}")]
        return matches[0] if len(matches) == 1 else None

    def _without(self, image: Image, taker: Image) -> Image:
        if image.id == taker.id:
            return image
        kept = tuple(tag for tag in image.repo_tags if tag not in taker.repo_tags)
        return self._with_pin(msgspec.structs.replace(image, repo_tags=kept))

    def _with_pin(self, image: Image) -> Image:
        names = (*image.repo_tags, *image.repo_digests)
        pinned = any(fnmatchcase(name, pattern) for name in names for pattern in self._pinned)
        return msgspec.structs.replace(image, pinned=pinned)

    def _index(self) -> None:
        self._ids = {
            name: image.id for image in self for name in (*image.repo_digests, *image.repo_tags)
        }


def documents(image: Image) -> tuple[str, ...]:
    """The digests of an image's config, manifest and indexes."""
    return (image.id, image.manifest, *(name.rpartition("@")[2] for name in image.repo_digests))


def title(image: Image) -> str:
    """The name of an image for the log."""
    return (*image.repo_tags, *image.repo_digests, image.id)[0]


def _joined(old: Iterable[str], new: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*old, *new)))


def _normal_pattern(pattern: str) -> str:
    try:
        return str(parse(pattern))
    except InvalidArgument:
        return pattern
