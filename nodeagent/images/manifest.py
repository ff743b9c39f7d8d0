"""The JSON documents of an image: index, manifest, config (image-spec), and Docker's forms of the same.

All functions are pure: bytes in, records out. What a document says is bounded and checked where it enters; the text of
an `InvalidArgument` names the field.
"""

import hashlib
import os
from collections.abc import Sequence
from operator import itemgetter
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from nodeagent.errors import InvalidArgument, NotFound, Unsupported
from nodeagent.linux.userns import MAX_ID
from nodeagent.records import ImageConfig
from nodeagent.text import one_line

MAX_DOCUMENT_BYTES = 4 << 20
MAX_LAYERS = 200  # an overlay's options must fit into one page

_SHOWN = 100  # of a text of somebody else's

_OCI = "application/vnd.oci.image."
_DOCKER = "application/vnd.docker."
OCI_INDEX = _OCI + "index.v1+json"
OCI_MANIFEST = _OCI + "manifest.v1+json"
DOCKER_INDEX = _DOCKER + "distribution.manifest.list.v2+json"
DOCKER_MANIFEST = _DOCKER + "distribution.manifest.v2+json"
DOCKER_CONFIG = _DOCKER + "container.image.v1+json"
DOCKER_LAYER = _DOCKER + "image.rootfs.diff.tar"
_SCHEMA_1 = _DOCKER + "distribution.manifest.v1+"
_INDEXES = frozenset((OCI_INDEX, DOCKER_INDEX))
_MANIFESTS = frozenset((OCI_MANIFEST, DOCKER_MANIFEST))
# Other types may still be one of these: some servers give all documents the type application/json.
ACCEPT = f"{OCI_INDEX}, {DOCKER_INDEX}, {OCI_MANIFEST}, {DOCKER_MANIFEST}, */*"

# The content tells the compression; nondistributable and foreign layers may be elsewhere (Descriptor.urls).
_LAYERS = (
    _OCI + "layer.v1.tar",
    _OCI + "layer.nondistributable.v1.tar",
    DOCKER_LAYER,
    _DOCKER + "image.rootfs.foreign.diff.tar",
)
_COMPRESSIONS = ("", "+gzip", "+zstd", ".gzip", ".zstd")
LAYER_TYPES = frozenset(layer + suffix for layer in _LAYERS for suffix in _COMPRESSIONS)

# Names of architectures beside those of Go, and the variants that may be left out.
_ARCHITECTURES = {
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "i386": ("386", ""),
    "aarch64": ("arm64", ""),
    "armhf": ("arm", "v7"),
    "armel": ("arm", "v6"),
}
_USUAL_VARIANTS = {("amd64", "v1"): "", ("arm64", "v8"): "", ("arm", ""): "v7"}

# What a node can run, the best first: its own programs, then 32-bit ones, which most such processors can run as well.
_RUNS = {
    "amd64": (("amd64", ""), ("386", "")),
    "arm64": (("arm64", ""), ("arm", "v8"), ("arm", "v7"), ("arm", "v6"), ("arm", "v5")),
}
ARCHITECTURE = _ARCHITECTURES[os.uname().machine][0]
PLATFORM = f"linux/{ARCHITECTURE}"

Digest = Annotated[str, Meta(pattern=r"^sha256:[0-9a-f]{64}\Z")]
Size = Annotated[int, Meta(ge=0, le=1 << 50)]
Strings = tuple[str, ...]


class Platform(msgspec.Struct, frozen=True):
    """A platform. features: what a node must have besides; none is known here, so entries with any are ranked last."""

    os: str | None = ""
    architecture: str | None = ""
    variant: str | None = ""
    features: Strings | None = msgspec.field(name="os.features", default=None)

    def __str__(self) -> str:
        """The platform for the log, without line ends: the author of the image must not write lines of it."""
        text = "/".join(filter(None, (self.os, self.architecture, self.variant)))
        return one_line(text, _SHOWN)


class Descriptor(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """The type, digest and size of a blob, and where else it may be."""

    media_type: str | None = ""
    digest: Digest
    size: Size
    urls: Strings | None = None
    annotations: dict[str, str | None] | None = None
    platform: Platform | None = None


class Index(msgspec.Struct, frozen=True):
    manifests: tuple[Descriptor, ...]


class Manifest(msgspec.Struct, frozen=True):
    """A manifest. It may have no layers: then all that its containers see is mounted into them."""

    config: Descriptor
    layers: tuple[Descriptor, ...] = ()


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """A config: how to run the image, and the digests of its unpacked layers. platform: as the config states it."""

    config: ImageConfig
    diff_ids: Strings
    platform: Platform

    @property
    def chain_ids(self) -> Strings:
        return chain_ids(self.diff_ids)


class _Kind(msgspec.Struct):
    """The fields of a document that tell its kind."""

    schema_version: int = msgspec.field(name="schemaVersion", default=0)
    media_type: str | None = msgspec.field(name="mediaType", default=None)
    manifests: msgspec.Raw = msgspec.Raw()
    layers: msgspec.Raw = msgspec.Raw()
    config: msgspec.Raw = msgspec.Raw()

    def has(self, *fields: str) -> bool:
        return any(bytes(getattr(self, field)) not in (b"", b"null") for field in fields)


class _Manifest(msgspec.Struct):
    """A manifest as it is written: without layers, the field may be empty, null or missing."""

    config: Descriptor
    layers: tuple[Descriptor, ...] | None = None


class _RootFS(msgspec.Struct):
    diff_ids: tuple[Digest, ...] | None = None
    type: str | None = None


class _Run(msgspec.Struct, rename="pascal"):
    """The run configuration as it is written. Null is empty everywhere, in lists too, as in Go's decoder."""

    user: str | None = None
    env: tuple[str | None, ...] | None = None
    entrypoint: tuple[str | None, ...] | None = None
    cmd: tuple[str | None, ...] | None = None
    working_dir: str | None = None
    stop_signal: str | None = None
    labels: dict[str, str | None] | None = None
    volumes: dict[str, Any] | None = None


class _Document(msgspec.Struct):
    rootfs: _RootFS | None = None
    architecture: str | None = None
    os: str | None = None
    variant: str | None = None
    config: _Run | None = None


T = TypeVar("T")


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def chain_ids(diff_ids: Strings) -> Strings:
    """The names of stacks of layers, lowest first (image-spec ``config.md``, Layer ChainID)."""
    chain: list[str] = []
    for diff_id in diff_ids:
        chain.append(digest(f"{chain[-1]} {diff_id}".encode()) if chain else diff_id)
    return tuple(chain)


def parse_manifest(data: bytes, media_type: str = "") -> Index | Manifest:
    """Parse an index or a manifest. media_type: as the transport gave it, if it did.

    A document that could be read as both an index and a manifest is refused: two readers of one digest must not see
    different images (CVE-2021-41190).
    """
    kind = _decode(data, _Kind, "manifest")
    stated = {media_type.partition(";")[0].strip().lower(), kind.media_type or ""}
    if kind.schema_version == 1 or any(name.startswith(_SCHEMA_1) for name in stated):
        raise Unsupported("manifest: Docker schema 1 is not supported; push the image anew")
    is_index, is_manifest = bool(stated & _INDEXES), bool(stated & _MANIFESTS)
    has_index, has_manifest = kind.has("manifests"), kind.has("layers", "config")
    if (is_index or has_index) and (is_manifest or has_manifest):
        raise InvalidArgument("manifest: both an index and a manifest")
    if has_index:
        return _decode(data, Index, "index")
    if has_manifest:
        found = _decode(data, _Manifest, "manifest")
        return _checked(Manifest(found.config, found.layers or ()))
    raise InvalidArgument("manifest: neither an index nor the manifest of an image")


def parse_image(data: bytes, layers: int) -> Image:
    """Parse the config of an image with so many layers. Whether it is for this node an index tells, not the config."""
    document = _decode(data, _Document, "config")
    rootfs = document.rootfs or _RootFS()
    if rootfs.type not in (None, "", "layers"):
        raise Unsupported(f'config: rootfs.type "{rootfs.type}"')
    diff_ids = rootfs.diff_ids or ()
    if len(diff_ids) != layers:
        raise InvalidArgument(
            f"config: rootfs.diff_ids has {len(diff_ids)} entries for {layers} layers"
        )
    return Image(
        config=_run_config(document.config or _Run()),
        diff_ids=diff_ids,
        platform=Platform(document.os, document.architecture or ARCHITECTURE, document.variant),
    )


def rank(platform: Platform) -> int | None:
    """How well this node runs programs for a platform: 0 is best, None is not at all."""
    architecture = (platform.architecture or "").lower()
    architecture, usual = _ARCHITECTURES.get(architecture, (architecture, ""))
    variant = (platform.variant or usual).lower()
    variant = f"v{variant}" if variant.isdecimal() else variant
    wanted = architecture, _USUAL_VARIANTS.get((architecture, variant), variant)
    runs = _RUNS[ARCHITECTURE]
    if (platform.os or "linux").lower() != "linux" or wanted not in runs:
        return None
    # An entry that needs a feature of the node is for other nodes, if there is one that needs none.
    return runs.index(wanted) + (len(runs) if platform.features else 0)


def is_for_this_node(platform: Platform) -> bool:
    return rank(platform) is not None


def choose(index: Index) -> Descriptor:
    """The manifest for this node: the first of the best. Raises `NotFound`."""
    return candidates(index)[0]


def candidates(index: Index) -> Sequence[Descriptor]:
    """The manifest for this node, else those without a platform, whose configs have to tell. Raises `NotFound`."""
    placed: list[tuple[int, Descriptor]] = []
    untold: list[Descriptor] = []
    offered: set[str] = set()
    for entry in index.manifests:
        if entry.platform is None or not entry.platform.architecture:
            untold.append(entry)
        elif (place := rank(entry.platform)) is not None:
            placed.append((place, entry))
        else:
            offered.add(str(entry.platform))
    if placed:
        return [min(placed, key=itemgetter(0))[1]]
    if untold:
        return untold
    names = ", ".join(sorted(offered)) or "nothing"
    raise NotFound(f"no manifest for {PLATFORM}, only for {names}")


def _checked(manifest: Manifest) -> Manifest:
    if len(manifest.layers) > MAX_LAYERS:
        raise InvalidArgument(f"manifest: {len(manifest.layers)} layers, not {MAX_LAYERS} at most")
    for number, layer in enumerate(manifest.layers):
        if layer.media_type not in LAYER_TYPES:
            kind = (layer.media_type or "")[:100]
            raise Unsupported(f'manifest: layer {number} is of type "{kind}"')
    return manifest


def _run_config(run: _Run) -> ImageConfig:
    directory = run.working_dir or ""
    config = ImageConfig(
        user=run.user or "",
        env=_strings(run.env),
        entrypoint=_strings(run.entrypoint),
        cmd=_strings(run.cmd),
        working_dir=f"/{directory}" if directory and directory[0] != "/" else directory,
        stop_signal=run.stop_signal or "",
        labels={key: value or "" for key, value in (run.labels or {}).items()},
        volumes=tuple(run.volumes or ()),
    )
    for field in config.__struct_fields__:
        _refuse_nul(field, getattr(config, field))
    if not all(map(_is_user, config.user.split(":"))):
        raise InvalidArgument(f'config: user "{config.user[:100]}" has a number that is no id')
    return config


def _strings(values: Sequence[str | None] | None) -> Strings:
    return tuple(value or "" for value in values or ())


def _is_user(text: str) -> bool:
    """Whether a text is a name, or the number of a user or group: with another one a process might stay root."""
    if not text.isdecimal():
        return True
    digits = text.lstrip("0")
    return text.isascii() and len(digits) <= 10 and int(digits or "0") <= MAX_ID


def _refuse_nul(field: str, value: str | Strings | dict[str, str]) -> None:
    """Refuse NUL, which no string of the kernel can have: what follows it would be lost."""
    strings = [value] if isinstance(value, str) else [*value]
    if isinstance(value, dict):
        strings += value.values()
    if any("\0" in string for string in strings):
        raise InvalidArgument(f"config: {field} has a NUL character")


def _decode(data: bytes, kind: type[T], what: str) -> T:
    if len(data) > MAX_DOCUMENT_BYTES:
        raise InvalidArgument(f"{what}: longer than {MAX_DOCUMENT_BYTES} bytes")
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise InvalidArgument(f"{what}: {error}") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise InvalidArgument(f"{what}: {type(error).__name__}") from None
