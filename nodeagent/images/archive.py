"""Images in tar files: OCI layouts (image-spec ``image-layout.md``) and the output of ``docker save``.

The archive is read once, front to back, so that it may be a pipe; it may be compressed. Its files are spooled beside
the layers under generated names, and known by the digest that they really have.
"""

import hashlib
import os
from collections.abc import AsyncIterator, Hashable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from posixpath import join, normpath
from typing import BinaryIO, NamedTuple

import msgspec

from nodeagent.errors import DataLoss, InvalidArgument, NotFound, ResourceExhausted, Unsupported
from nodeagent.images import manifest
from nodeagent.images.budget import Budget, is_full
from nodeagent.images.content import Blob
from nodeagent.images.manifest import (
    DOCKER_CONFIG,
    DOCKER_LAYER,
    DOCKER_MANIFEST,
    Descriptor,
    Index,
    Manifest,
)
from nodeagent.images.plan import Plan
from nodeagent.images.reference import Reference, parse
from nodeagent.images.unpack import tar
from nodeagent.images.unpack.compression import decompressed
from nodeagent.images.unpack.layers import write_all

MAX_FILES = 10_000
_MAX_NAME = 4096  # all names are kept in memory, and a pax header has room for a megabyte
_BLOBS = "blobs/sha256/"
_NAMES = ("io.containerd.image.name", "org.opencontainers.image.ref.name")


class File(NamedTuple):
    path: Path
    digest: str
    size: int


class Loaded(NamedTuple):
    """An image in the archive. digest: of the document that its names stand for; empty where that is not known."""

    plan: Plan
    names: tuple[Reference, ...]
    digest: str


class _DockerImage(msgspec.Struct, rename="pascal"):
    """An entry of manifest.json."""

    config: str
    layers: tuple[str, ...] | None = None
    repo_tags: tuple[str, ...] | None = None


@dataclass
class _Arrived:
    blob: Blob
    is_complete = True

    async def reaches(self, _size_bytes: int) -> None:
        """All of it came with the archive."""

    async def complete(self) -> None:
        """All of it came with the archive."""


class Archive:
    """The spooled files, by their names in the archive; links lead from name to name."""

    def __init__(self, files: dict[str, File], links: dict[str, str]) -> None:
        self._files = files
        self._links = links
        self._by_digest = {file.digest: file for file in files.values()}

    attempts = 1

    def origin(self, descriptor: Descriptor) -> Hashable:
        return (self, descriptor.digest)

    @asynccontextmanager
    async def open(self, descriptor: Descriptor, _attempt: int) -> AsyncIterator[_Arrived]:
        file = self._content(descriptor)
        blob = Blob(file.path, file.digest, file.size, complete=True)
        try:
            yield _Arrived(blob)
        finally:
            blob.close()

    def images(self) -> list[Loaded]:
        """The images for this node. Raises `InvalidArgument` for a file that is no archive of images."""
        if "index.json" in self._files:
            images = list(self._oci_images())
        elif "manifest.json" in self._files:
            images = list(self._docker_images())
        else:
            raise InvalidArgument(
                "archive: has neither index.json (an OCI layout) nor manifest.json (a docker archive) at its top; "
                "write it with docker save, podman save or skopeo copy"
            )
        if not images:
            raise NotFound(
                f"archive: no image for {manifest.PLATFORM}, which this node runs; save the one of that platform"
            )
        return images

    # --- OCI layouts ---

    def _oci_images(self) -> Iterator[Loaded]:
        index = manifest.parse_manifest(self._read("index.json"))
        if not isinstance(index, Index):
            raise InvalidArgument("archive: index.json is no index")
        best: dict[Hashable, tuple[int, Descriptor]] = {}
        for entry in index.manifests:
            place = manifest.rank(entry.platform) if entry.platform else 0
            names = tuple(_annotated_names(entry))
            key = names or entry.digest  # several platforms of an image have the same names
            if place is not None and (key not in best or place < best[key][0]):
                best[key] = place, entry
        for _, entry in best.values():
            yield Loaded(self._oci_plan(entry), tuple(_annotated_names(entry)), entry.digest)

    def _oci_plan(self, entry: Descriptor) -> Plan:
        kept = [self._document(entry)]
        document = manifest.parse_manifest(kept[0], entry.media_type or "")
        if isinstance(document, Index):
            chosen = manifest.choose(document)
            kept.append(self._document(chosen))
            document = manifest.parse_manifest(kept[1], chosen.media_type or "")
        if isinstance(document, Index):
            raise InvalidArgument("archive: indexes in an index")
        digest = manifest.digest(kept[-1])
        config = self._document(document.config)
        image = manifest.parse_image(config, len(document.layers))
        return Plan(digest, document, image, (*kept, config))

    # --- docker archives ---

    def _docker_images(self) -> Iterator[Loaded]:
        try:
            entries = msgspec.json.decode(
                self._read("manifest.json"), type=tuple[_DockerImage, ...]
            )
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidArgument(f"archive: manifest.json: {error}") from None
        for entry in entries:
            names = tuple(parse(name) for name in entry.repo_tags or ())
            yield Loaded(self._docker_plan(entry), names, "")

    def _docker_plan(self, entry: _DockerImage) -> Plan:
        """The plan of an image in a docker archive, which has no manifest: one is made."""
        config = self._read(entry.config)
        made = Manifest(
            config=self._descriptor(entry.config, DOCKER_CONFIG),
            layers=tuple(self._descriptor(name, DOCKER_LAYER) for name in entry.layers or ()),
        )
        image = manifest.parse_image(config, len(made.layers))
        document = {"schemaVersion": 2, "mediaType": DOCKER_MANIFEST}
        fields: dict[str, object] = msgspec.to_builtins(made)
        data = msgspec.json.encode(document | fields, order="sorted")
        manifest.parse_manifest(data)
        return Plan(manifest.digest(data), made, image, (data, config))

    def _descriptor(self, name: str, media_type: str) -> Descriptor:
        file = self._file(name)
        return Descriptor(media_type=media_type, digest=file.digest, size=file.size)

    # --- files ---

    def _document(self, descriptor: Descriptor) -> bytes:
        return _bounded(self._content(descriptor))

    def _read(self, name: str) -> bytes:
        return _bounded(self._file(name))

    def _content(self, descriptor: Descriptor) -> File:
        file = self._by_digest.get(descriptor.digest)
        if file is None or file.size != descriptor.size:
            raise InvalidArgument(
                f"archive: no file of {descriptor.size} bytes with the digest {descriptor.digest}"
            )
        return file

    def _file(self, name: str) -> File:
        for _ in range(4):
            name = normpath(name)
            if name in self._files:
                return self._files[name]
            name = self._links.get(name, "")
        raise InvalidArgument(f'archive: no file "{tar.shown(name)}"')


def spool(source: Path | BinaryIO, directory: Path, max_bytes: int) -> Archive:
    """Read the whole archive into the new `directory`. Blocks. Raises what `tar` raises, and `DataLoss`."""
    directory.mkdir(mode=0o700)
    budget = Budget(directory.parent, max_bytes=max_bytes, max_entries=MAX_FILES)
    try:
        if isinstance(source, Path):
            with source.open("rb") as opened:
                return _spool(opened, directory, budget)
        return _spool(source, directory, budget)
    except OSError as error:
        if is_full(error):
            raise ResourceExhausted(f"archive: {error}") from None
        raise


def _spool(source: BinaryIO, directory: Path, budget: Budget) -> Archive:
    files: dict[str, File] = {}
    links: dict[str, str] = {}
    for entry, pieces in tar.read(decompressed(source)):
        budget.spend(entries=1)
        if max(len(entry.name), len(entry.target)) > _MAX_NAME:
            raise InvalidArgument(f'archive: "{tar.shown(entry.name)}": the name is too long')
        name = normpath(entry.name)
        if entry.kind == "file":
            files[name] = _spool_file(directory / str(len(files)), pieces, budget)
            _check_name(name, files[name])
        elif entry.kind == "symlink":
            links[name] = join(name, "..", entry.target)
        elif entry.kind == "link":
            links[name] = entry.target
    return Archive(files, links)


def _spool_file(path: Path, pieces: Iterator[tar.Piece], budget: Budget) -> File:
    content, size = hashlib.sha256(), 0
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        for piece in pieces:
            if isinstance(piece, tar.Hole):
                raise Unsupported("archive: has a sparse file")
            budget.spend(size_bytes=len(piece))
            content.update(piece)
            size += len(piece)
            write_all(file, piece)
    finally:
        os.close(file)
    return File(path, f"sha256:{content.hexdigest()}", size)


def _check_name(name: str, file: File) -> None:
    if name.startswith(_BLOBS) and name != _BLOBS + file.digest.removeprefix("sha256:"):
        raise DataLoss(f'archive: "{tar.shown(name)}" has the digest {file.digest}')


def _annotated_names(entry: Descriptor) -> Iterator[Reference]:
    """The names in annotations. The second may be a whole name, or only a tag, which is no name by itself."""
    annotations = entry.annotations or {}
    full, short = (annotations.get(key) or "" for key in _NAMES)
    if full:
        yield parse(full)
    elif "/" in short or ":" in short:
        yield parse(short)


def _bounded(file: File) -> bytes:
    if file.size > manifest.MAX_DOCUMENT_BYTES:
        raise InvalidArgument(f"archive: a document of {file.size} bytes")
    return file.path.read_bytes()
