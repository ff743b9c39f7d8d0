"""The manifest of a security profile that is an OCI artifact: one layer, which is the profile itself.

The type of its config says what an artifact is or, where the config is the empty one, artifactType does (image-spec
``manifest.md``, "Guidelines for Artifact Usage"). The type of the layer is whatever the tool that pushed it uses.
All functions are pure; a wrong manifest stays wrong, as its digest names it.
"""

import msgspec

from nodeagent.errors import SecurityProfileInvalid
from nodeagent.images import manifest
from nodeagent.images.manifest import Descriptor
from nodeagent.text import one_line

SECCOMP = "application/vnd.cncf.seccomp-profile.config.v1+json"
MAX_PROFILE_BYTES = 1 << 20
MAX_MANIFEST_BYTES = 1 << 16  # it names two blobs; what is kept of it is paid for by the node

_EMPTY = "application/vnd.oci.empty.v1+json"
_SHOWN = 100  # of a text of somebody else's, in an error


class _Manifest(msgspec.Struct, frozen=True, rename="camel"):
    config: Descriptor
    layers: tuple[Descriptor, ...]
    schema_version: int = 0
    media_type: str = ""
    artifact_type: str = ""
    manifests: msgspec.Raw = msgspec.Raw()


def parse_seccomp(data: bytes, media_type: str = "") -> Descriptor:
    """The descriptor of the profile in an artifact's manifest. media_type: as the transport gave it, if it did.

    Raises SecurityProfileInvalid for what is no artifact with one seccomp profile of at most MAX_PROFILE_BYTES.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise SecurityProfileInvalid(f"manifest: longer than {MAX_MANIFEST_BYTES} bytes")
    _check_media_type(media_type.partition(";")[0].strip().lower())
    try:
        found = msgspec.json.decode(data, type=_Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise SecurityProfileInvalid(f"manifest: {error}") from None
    _check_media_type(found.media_type)
    if found.schema_version != 2 or bytes(found.manifests) not in (b"", b"null"):
        raise SecurityProfileInvalid("manifest: not the manifest of an artifact")
    _check_type(found)
    if len(found.layers) != 1:
        raise SecurityProfileInvalid(f"manifest: {len(found.layers)} layers, must be exactly one")
    [layer] = found.layers
    if layer.urls:
        raise SecurityProfileInvalid("manifest: the profile is kept outside of the registry")
    if not 0 < layer.size <= MAX_PROFILE_BYTES:
        raise SecurityProfileInvalid(
            f"manifest: a profile of {layer.size} bytes, not 1 to {MAX_PROFILE_BYTES}"
        )
    return layer


def _check_media_type(stated: str) -> None:
    if stated not in ("", manifest.OCI_MANIFEST):
        raise SecurityProfileInvalid(
            f'manifest: is of type "{one_line(stated, _SHOWN)}", not an artifact'
        )


def _check_type(found: _Manifest) -> None:
    """Refuse a manifest in which two readers that go by one field each would see different types."""
    kind = found.config.media_type or ""
    if kind == _EMPTY:
        kind = found.artifact_type
    elif found.artifact_type not in ("", kind):
        raise SecurityProfileInvalid(
            f'manifest: artifactType "{one_line(found.artifact_type, _SHOWN)}" with a config of type '
            f'"{one_line(kind, _SHOWN)}"'
        )
    if kind != SECCOMP:
        raise SecurityProfileInvalid(
            f'manifest: an artifact of type "{one_line(kind, _SHOWN)}", not "{SECCOMP}"'
        )
