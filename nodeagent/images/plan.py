"""The plan of an installation: an image whose documents are known, and whose layers are to be fetched."""

from dataclasses import dataclass

from nodeagent.images.manifest import Image, Manifest


@dataclass(frozen=True, slots=True)
class Plan:
    """An image to be installed.

    documents: what is kept of it besides its layers, beginning with the index or manifest that its name stands for.
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
