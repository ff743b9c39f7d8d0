"""Security profiles as OCI artifacts, as the tools of the field push them, for both kinds of registry."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from nodeagent.images.artifact import SECCOMP
from tests.support import images
from tests.support.images import OCI, Image

EMPTY = b"{}"


@dataclass(frozen=True, kw_only=True)
class Artifact(Image):
    """One profile in one layer, under no tag. changes: fields of the manifest that are otherwise."""

    repository: str = "test/profile"
    tags: tuple[str, ...] = ()
    layers: tuple[images.Layer, ...] = ()
    indexed: bool = False
    profile: bytes = b""
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        return images.digest(self.manifests()[0])

    @property
    def size(self) -> int:
        """What is kept of it."""
        return len(self.manifests()[0]) + len(self.profile)

    def reference(self, host: str) -> str:
        return f"{host}/{self.repository}@{self.digest}"

    def blobs(self) -> Iterator[bytes]:
        yield from (EMPTY, self.profile)

    def manifests(self) -> list[bytes]:
        manifest = {
            "schemaVersion": 2,
            "mediaType": OCI.manifest,
            "artifactType": SECCOMP,
            "config": images.descriptor(EMPTY, SECCOMP),
            "layers": [images.descriptor(self.profile, "application/json")],
            **self.changes,
        }
        return [images.encode(manifest)]


def seccomp(profile: dict[str, Any], **fields: Any) -> Artifact:
    """An artifact of a profile in the form of the OCI runtime specification."""
    return Artifact(profile=json.dumps(profile).encode(), **fields)
