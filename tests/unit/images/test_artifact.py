"""What is taken for the manifest of a security profile, and what is not."""

import json
from typing import Any

import pytest

from nodeagent.errors import SecurityProfileInvalid
from nodeagent.images import artifact, manifest

EMPTY = "application/vnd.oci.empty.v1+json"
APPARMOR = "application/vnd.cncf.apparmor-profile.config.v1+json"
LAYER = {"mediaType": "application/json", "digest": f"sha256:{'a' * 64}", "size": 40}


def config(kind: str) -> dict[str, Any]:
    return {"mediaType": kind, "digest": f"sha256:{'c' * 64}", "size": 2}


def document(**changes: Any) -> bytes:
    """A manifest as the tools of the field push it; None leaves a field out."""
    fields = {
        "schemaVersion": 2,
        "mediaType": manifest.OCI_MANIFEST,
        "artifactType": artifact.SECCOMP,
        "config": config(artifact.SECCOMP),
        "layers": [LAYER],
        **changes,
    }
    return json.dumps({name: value for name, value in fields.items() if value is not None}).encode()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mediaType": None},
        {"artifactType": None},
        {"config": config(EMPTY)},
        {"layers": [{**LAYER, "mediaType": "application/vnd.oci.image.layer.v1.tar"}]},
        {"layers": [{**LAYER, "annotations": {"org.opencontainers.image.title": "p.json"}}]},
        {"annotations": {"a": "b"}, "subject": LAYER},
        {"layers": [{**LAYER, "size": artifact.MAX_PROFILE_BYTES}]},
    ],
)
def test_what_the_field_pushes(changes: dict[str, Any]) -> None:
    for media_type in ("", manifest.OCI_MANIFEST, f"{manifest.OCI_MANIFEST}; charset=utf-8"):
        found = artifact.parse_seccomp(document(**changes), media_type)
        assert found.digest == LAYER["digest"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"annotations": {"a": "x" * artifact.MAX_MANIFEST_BYTES}}, "longer than 65536 bytes"),
        ({"schemaVersion": 1}, "not the manifest of an artifact"),
        ({"mediaType": manifest.OCI_INDEX}, f'is of type "{manifest.OCI_INDEX}"'),
        ({"manifests": []}, "not the manifest of an artifact"),
        ({"artifactType": None, "config": config(EMPTY)}, 'of type ""'),
        ({"artifactType": APPARMOR, "config": config(EMPTY)}, f'of type "{APPARMOR}"'),
        ({"artifactType": None, "config": config(APPARMOR)}, f'of type "{APPARMOR}"'),
        ({"artifactType": APPARMOR}, "with a config of type"),
        (
            {"artifactType": None, "config": config("application/vnd.oci.image.config.v1+json")},
            'of type "application/vnd.oci.image.config.v1+json"',
        ),
        ({"config": None}, "missing required field `config`"),
        ({"layers": None}, "missing required field `layers`"),
        ({"layers": []}, "0 layers"),
        ({"layers": [LAYER, LAYER]}, "2 layers"),
        ({"layers": [{**LAYER, "size": artifact.MAX_PROFILE_BYTES + 1}]}, "bytes, not 1 to"),
        ({"layers": [{**LAYER, "size": 0}]}, "0 bytes"),
        ({"layers": [{**LAYER, "digest": "md5:1"}]}, "layers[0].digest"),
        ({"layers": [{**LAYER, "urls": ["http://127.0.0.1/p"]}]}, "outside of the registry"),
    ],
)
def test_what_is_none(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(SecurityProfileInvalid) as error:
        artifact.parse_seccomp(document(**changes))
    assert text in str(error.value)


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b"{", b"[" * 100_000, b"null"])
def test_what_is_no_document(data: bytes) -> None:
    with pytest.raises(SecurityProfileInvalid, match="manifest: "):
        artifact.parse_seccomp(data)


def test_what_the_transport_says_counts() -> None:
    with pytest.raises(SecurityProfileInvalid, match="is of type"):
        artifact.parse_seccomp(document(), manifest.OCI_INDEX)
