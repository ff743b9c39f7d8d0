"""The JSON documents of an image: index, manifest, config (image-spec), and Docker's forms of the same.

Everything here is pure: bytes in, records out. What a document says is bounded and checked where it enters; a text of
`InvalidArgument` names the field.
"""

import hashlib
import os
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from nodeagent.errors import InvalidArgument, NotFound, Unsupported
from nodeagent.images.tar import MAX_ID
from nodeagent.records import ImageConfig

MAX_DOCUMENT_BYTES = 4 << 20
MAX_LAYERS = 200  # an overlay's options must fit into one page

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
ACCEPT = f"{OCI_INDEX}, {DOCKER_INDEX}, {OCI_MANIFEST}, {DOCKER_MANIFEST}"

# The compression is seen from the content; nondistributable and foreign layers may be elsewhere (Descriptor.urls).
_LAYERS = (
    _OCI + "layer.v1.tar",
    _OCI + "layer.nondistributable.v1.tar",
    DOCKER_LAYER,
    _DOCKER + "image.rootfs.foreign.diff.tar",
)
_COMPRESSIONS = ("", "+gzip", "+zstd", ".gzip", ".zstd")
LAYER_TYPES = frozenset(layer + suffix for layer in _LAYERS for suffix in _COMPRESSIONS)

# Architecture and variants of this node, the best variant first.
_PLATFORMS = {"x86_64": ("amd64", ("", "v1")), "aarch64": ("arm64", ("v8", ""))}
ARCHITECTURE, _VARIANTS = _PLATFORMS[os.uname().machine]
PLATFORM = f"linux/{ARCHITECTURE}"

Digest = Annotated[str, Meta(pattern=r"^sha256:[0-9a-f]{64}\Z")]
Size = Annotated[int, Meta(ge=0, le=1 << 50)]
Strings = tuple[str, ...]


class Platform(msgspec.Struct, frozen=True):
    os: str = ""
    architecture: str = ""
    variant: str = ""


_OURS = tuple(Platform("linux", ARCHITECTURE, variant) for variant in _VARIANTS)


class Descriptor(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """What a blob is, and how to know that one has got it."""

    media_type: str = ""
    digest: Digest
    size: Size
    urls: Strings | None = None
    annotations: dict[str, str] | None = None
    platform: Platform | None = None


class Index(msgspec.Struct, frozen=True):
    manifests: tuple[Descriptor, ...]


class Manifest(msgspec.Struct, frozen=True):
    config: Descriptor
    layers: tuple[Descriptor, ...]


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """A config: how to run the image, and the digests of its unpacked layers."""

    config: ImageConfig
    diff_ids: Strings

    @property
    def chain_ids(self) -> Strings:
        return chain_ids(self.diff_ids)


class _Kind(msgspec.Struct):
    """As much of a document as tells what it is."""

    schema_version: int = msgspec.field(name="schemaVersion", default=0)
    media_type: str | None = msgspec.field(name="mediaType", default=None)
    manifests: msgspec.Raw = msgspec.Raw()
    layers: msgspec.Raw = msgspec.Raw()
    config: msgspec.Raw = msgspec.Raw()

    def has(self, *fields: str) -> bool:
        return any(bytes(getattr(self, field)) not in (b"", b"null") for field in fields)


class _RootFS(msgspec.Struct):
    diff_ids: tuple[Digest, ...]
    type: str = "layers"


class _Run(msgspec.Struct, rename="pascal"):
    user: str | None = None
    env: Strings | None = None
    entrypoint: Strings | None = None
    cmd: Strings | None = None
    working_dir: str | None = None
    stop_signal: str | None = None
    labels: dict[str, str] | None = None
    volumes: dict[str, Any] | None = None


class _Document(msgspec.Struct):
    rootfs: _RootFS
    architecture: str | None = None
    os: str | None = None
    config: _Run | None = None


T = TypeVar("T")


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def chain_ids(diff_ids: Strings) -> Strings:
    """Names of stacks of layers, lowest first (image-spec ``config.md``, Layer ChainID)."""
    chain: list[str] = []
    for diff_id in diff_ids:
        chain.append(digest(f"{chain[-1]} {diff_id}".encode()) if chain else diff_id)
    return tuple(chain)


def parse_manifest(data: bytes, media_type: str = "") -> Index | Manifest:
    """media_type: what the transport said, if it did.

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
        return _checked(_decode(data, Manifest, "manifest"))
    raise InvalidArgument("manifest: neither an index nor the manifest of an image")


def parse_image(data: bytes, layers: int) -> Image:
    """The config of an image with so many layers; refuses one of another platform."""
    document = _decode(data, _Document, "config")
    platform = f"{document.os or 'linux'}/{document.architecture or ARCHITECTURE}"
    if platform != PLATFORM:
        raise NotFound(f"the image is for {platform}, this node is {PLATFORM}")
    if document.rootfs.type != "layers":
        raise Unsupported(f'config: rootfs.type "{document.rootfs.type}"')
    diff_ids = document.rootfs.diff_ids
    if len(diff_ids) != layers:
        raise InvalidArgument(
            f"config: rootfs.diff_ids has {len(diff_ids)} entries for {layers} layers"
        )
    return Image(config=_run_config(document.config or _Run()), diff_ids=diff_ids)


def is_for_this_node(platform: Platform) -> bool:
    return platform in _OURS


def choose(index: Index) -> Descriptor:
    """The manifest for this node; of several, the first with the best variant."""
    for platform in _OURS:
        for entry in index.manifests:
            if entry.platform == platform:
                return entry
    if len(index.manifests) == 1 and index.manifests[0].platform is None:
        return index.manifests[0]
    offered = sorted({_name(entry.platform) for entry in index.manifests if entry.platform})
    raise NotFound(f"no manifest for {PLATFORM}, only for {', '.join(offered) or 'nothing'}")


def _checked(manifest: Manifest) -> Manifest:
    if not 1 <= len(manifest.layers) <= MAX_LAYERS:
        raise InvalidArgument(f"manifest: {len(manifest.layers)} layers, not 1 to {MAX_LAYERS}")
    for number, layer in enumerate(manifest.layers):
        if layer.media_type not in LAYER_TYPES:
            raise Unsupported(f'manifest: layer {number} is of type "{layer.media_type[:100]}"')
    return manifest


def _run_config(run: _Run) -> ImageConfig:
    directory = run.working_dir or ""
    config = ImageConfig(
        user=run.user or "",
        env=run.env or (),
        entrypoint=run.entrypoint or (),
        cmd=run.cmd or (),
        working_dir=f"/{directory}" if directory and directory[0] != "/" else directory,
        stop_signal=run.stop_signal or "",
        labels=run.labels or {},
        volumes=tuple(run.volumes or ()),
    )
    for field in config.__struct_fields__:
        _refuse_nul(field, getattr(config, field))
    if not all(map(_is_user, config.user.split(":"))):
        raise InvalidArgument(f'config: user "{config.user[:100]}" has a number that is no id')
    return config


def _is_user(text: str) -> bool:
    """A name, or the number of a user or group: others would leave the process root, or somebody nobody meant."""
    if not text.isdecimal():
        return True
    digits = text.lstrip("0")
    return text.isascii() and len(digits) <= 10 and int(digits or "0") <= MAX_ID


def _refuse_nul(field: str, value: str | Strings | dict[str, str]) -> None:
    """No string of the kernel's can hold one: what comes after it would be lost."""
    strings = [value] if isinstance(value, str) else [*value]
    if isinstance(value, dict):
        strings += value.values()
    if any("\0" in string for string in strings):
        raise InvalidArgument(f"config: {field} has a NUL character")


def _name(platform: Platform) -> str:
    return "/".join(filter(None, (platform.os, platform.architecture, platform.variant)))


def _decode(data: bytes, kind: type[T], what: str) -> T:
    if len(data) > MAX_DOCUMENT_BYTES:
        raise InvalidArgument(f"{what}: longer than {MAX_DOCUMENT_BYTES} bytes")
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise InvalidArgument(f"{what}: {error}") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise InvalidArgument(f"{what}: {type(error).__name__}") from None
