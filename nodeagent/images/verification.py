"""Whether the files of images and security profiles are what their records say.

A document (manifest, index, config, profile) is named by the digest of its content, which is computed again. A layer is
compared with the digest of its tree (`unpack.tree`), and read; one that an earlier version has unpacked has none, and
is only read. A document that is missing is no damage: nothing but a pull needs it, which fetches it again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nodeagent.images import manifest
from nodeagent.images.image_store import title
from nodeagent.images.reference import is_digest
from nodeagent.images.unpack import tree
from nodeagent.records import Image, Layer
from nodeagent.store import Store

DOCUMENTS = ("blobs/sha256", "profiles/sha256")


@dataclass(frozen=True, slots=True, kw_only=True)
class Damaged:
    """A damaged document or layer. path: may be missing; layer: its chain ID; images: those that have it."""

    path: Path
    why: str
    layer: str = ""
    images: tuple[str, ...] = ()


def documents(root: Path) -> Iterator[tuple[Path, Damaged | None]]:
    """Every document, and what is wrong with it."""
    for directory in DOCUMENTS:
        for path in sorted((root / directory).glob("*")):
            if is_digest(f"sha256:{path.name}"):
                yield path, _checked(path)


def layers(root: Path, store: Store) -> Iterator[tuple[Path, Damaged | None]]:
    """Every layer that is recorded, and what is wrong with it."""
    images = store.all(Image)
    for layer in store.all(Layer):
        path = root / "layers" / layer.chain_id.removeprefix("sha256:")
        if why := _difference(path, layer):
            names = tuple(title(image) for image in images if layer.chain_id in image.layers)
            yield path, Damaged(path=path, why=why, layer=layer.chain_id, images=names)
        else:
            yield path, None


def _checked(path: Path) -> Damaged | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None  # removed meanwhile
    except OSError as error:
        return Damaged(path=path, why=str(error.strerror))
    if manifest.digest(data) == f"sha256:{path.name}":
        return None
    return Damaged(path=path, why=f"{len(data)} bytes of another digest")


def _difference(path: Path, layer: Layer) -> str:
    """What is wrong with a layer, "" for nothing."""
    try:
        if layer.tree and tree.digest(path) != layer.tree:
            return "not what was unpacked: a file was changed, removed or added"
        tree.read(path)
    except FileNotFoundError:
        return "missing, or changed while it was read"
    except OSError as error:
        return str(error)
    return ""
