"""Which of an image's manifests a node takes, and images that have less than others."""

from __future__ import annotations

import io
import json
import logging
from typing import Any

import pytest

from nodeagent.errors import NotFound
from nodeagent.images import manifest
from nodeagent.images.catalog import Images
from tests.support import images as made
from tests.support import tars
from tests.support.fake_registry import Server, image, layer
from tests.support.places import Place

HERE = manifest.ARCHITECTURE
LAYER = layer(tars.file("a", b"content"))


def foreign(**fields: Any) -> made.Image:
    """One manifest, whose config names another architecture."""
    return made.Image(
        "test/image", ("1",), (LAYER,), architectures=("s390x",), indexed=False, **fields
    )


def serve_index(server: Server, *entries: tuple[made.Image, dict[str, str] | None]) -> None:
    """An index over single manifests, each with its platform."""
    listed = []
    for source, platform in entries:
        server.add(source)
        listed.append(made.descriptor(source.top()[0], manifest.OCI_MANIFEST))
        if platform is not None:
            listed[-1]["platform"] = platform
    index = made.encode({"schemaVersion": 2, "manifests": listed})
    server.contents["/v2/test/image/manifests/1"] = index, manifest.OCI_INDEX


async def test_a_single_manifest_is_taken_as_it_is(
    images: Images, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.add(foreign())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            pulled = await images.pull(f"{server.host}/test/image:1")
    assert (images.lower_dirs(pulled)[0] / "a").read_bytes() == b"content"
    (note,) = [record.getMessage() for record in caplog.records]
    assert f"{server.host}/test/image:1: its config names linux/s390x" in note


async def test_an_index_is_believed(images: Images, server: Server) -> None:
    """Builders that cross-compile write the right index, and the builder's architecture into the config."""
    serve_index(server, (foreign(), {"os": "linux", "architecture": HERE}))
    pulled = await images.pull(f"{server.host}/test/image:1")
    assert pulled.manifest == tars.digest(foreign().top()[0])


async def test_an_index_without_platforms_is_looked_into(images: Images, server: Server) -> None:
    ours = made.Image("test/image", ("2",), (LAYER,), architectures=(HERE,), indexed=False)
    attestation = json.loads(ours.top()[0])
    attestation["layers"][0]["mediaType"] = "application/vnd.in-toto+json"
    served = [foreign().top()[0], made.encode(attestation), ours.top()[0]]
    serve_index(server, (foreign(), None), (ours, None))
    for data in served:
        path = f"/v2/test/image/manifests/{tars.digest(data)}"
        server.contents[path] = data, manifest.OCI_MANIFEST
    listed = [made.descriptor(data, manifest.OCI_MANIFEST) for data in served]
    index = made.encode({"schemaVersion": 2, "manifests": listed})
    server.contents["/v2/test/image/manifests/1"] = index, manifest.OCI_INDEX
    pulled = await images.pull(f"{server.host}/test/image:1")
    assert pulled.manifest == tars.digest(ours.top()[0])


async def test_an_index_of_nothing_for_this_node(images: Images, server: Server) -> None:
    other = made.Image("test/image", ("2",), (), architectures=("s390x",), indexed=False)
    serve_index(server, (foreign(), None), (other, None))
    with pytest.raises(NotFound, match=f"no manifest for linux/{HERE}"):
        await images.pull(f"{server.host}/test/image:1")


async def test_one_entry_without_a_platform_is_taken_as_it_is(
    images: Images, server: Server
) -> None:
    serve_index(server, (foreign(), None))
    await images.pull(f"{server.host}/test/image:1")


async def test_an_image_without_layers(place: Place, server: Server) -> None:
    server.add(image())
    async with place.open() as images:
        pulled = await images.pull(f"{server.host}/test/image:1")
        assert pulled.size_bytes > 0
        (empty,) = images.lower_dirs(pulled)
        assert list(empty.iterdir()) == []
        assert empty.stat().st_mode & 0o7777 == 0o755
    async with place.open() as images:
        assert images.find(f"{server.host}/test/image:1") == pulled
        await images.remove(pulled.id)
        assert empty.is_dir()


async def test_an_archive_has_the_best_of_several_platforms(images: Images) -> None:
    """One name for two platforms that the node runs: its own counts, in whichever order."""
    ours = image(layer(tars.file("b")))
    name = {"io.containerd.image.name": "demo.local/a:1"}
    worse = {"amd64": "386", "arm64": "arm"}[HERE]
    for order in (1, -1):
        pair = [(foreign(), worse), (ours, HERE)][::order]
        entries = [
            made.descriptor(source.top()[0], manifest.OCI_MANIFEST)
            | {"annotations": name, "platform": {"os": "linux", "architecture": architecture}}
            for source, architecture in pair
        ]
        blobs = {blob for source, _ in pair for blob in (*source.blobs(), source.top()[0])}
        archive = tars.archive(
            *(tars.file(f"blobs/sha256/{tars.digest(blob)[7:]}", blob) for blob in blobs),
            tars.file("index.json", made.encode({"schemaVersion": 2, "manifests": entries})),
        )
        (loaded,) = await images.load(io.BytesIO(archive))
        assert loaded.manifest == tars.digest(ours.top()[0])
