"""Images from tar files."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from nodeagent import control
from nodeagent.config import Config
from nodeagent.errors import DataLoss, InvalidArgument, NotFound, ResourceExhausted
from nodeagent.images.catalog import Images
from tests.support import images as made
from tests.support import tars
from tests.support.fake_registry import image, layer
from tests.support.places import Place

SAMPLE = image(layer(tars.file("a", b"lower")), layer(tars.file("b", b"upper")))


def oci(source: made.Image, **annotations: str) -> bytes:
    """An OCI layout, its index.json last, as some tools write it."""
    top, media_type = source.top()
    blobs = {*source.blobs(), *source.manifests(), top}
    entry = made.descriptor(top, media_type) | {"annotations": annotations}
    index = made.encode({"schemaVersion": 2, "manifests": [entry]})
    return tars.archive(
        tars.directory("blobs/"),
        *(tars.file(f"./blobs/sha256/{tars.digest(blob)[7:]}", blob) for blob in blobs),
        tars.file("oci-layout", b'{"imageLayoutVersion":"1.0.0"}'),
        tars.file("index.json", index),
    )


def docker(source: made.Image, *tags: str, **changes: Any) -> bytes:
    """The archive that `docker save` wrote for many years: layers are plain tars, equal ones are links."""
    config = source._config("amd64")
    name = f"{tars.digest(config)[7:]}.json"
    layers = [f"{number}/layer.tar" for number in range(len(source.layers))]
    entry = {"Config": name, "RepoTags": tags or None, "Layers": layers, **changes}
    return tars.archive(
        *(
            tars.file(path, gzip.decompress(layer.blob))
            for path, layer in zip(layers, source.layers, strict=True)
        ),
        tars.symlink("again/layer.tar", "../0/layer.tar"),
        tars.file(name, config),
        tars.file("manifest.json", json.dumps([entry]).encode()),
    )


async def test_oci_layout(place: Place, tmp_path: Path) -> None:
    file = tmp_path / "image.tar"
    file.write_bytes(oci(SAMPLE, **{"io.containerd.image.name": "demo.local/busybox:1"}))
    async with place.open() as images:
        (loaded,) = await images.load(file)
        assert loaded.repo_tags == ("demo.local/busybox:1",)
        assert loaded.repo_digests == (f"demo.local/busybox@{tars.digest(SAMPLE.top()[0])}",)
        assert loaded.id == tars.digest(SAMPLE._config("amd64"))
        upper, lower = images.lower_dirs(loaded)
        assert (upper / "b").read_bytes() + (lower / "a").read_bytes() == b"upperlower"
    assert place.left("staging") == []
    async with place.open() as images:
        assert images.find("demo.local/busybox:1") == loaded


async def test_a_layout_with_an_index(images: Images, tmp_path: Path) -> None:
    file = tmp_path / "image.tar"
    indexed = made.Image(
        "test/several", ("1", "2"), SAMPLE.layers, architectures=("arm64", "amd64")
    )
    made.write_archive(indexed, file)
    (loaded,) = await images.load(file)
    assert loaded.repo_tags == ("docker.io/test/several:1", "docker.io/test/several:2")
    assert loaded.id == tars.digest(indexed._config("amd64"))


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
async def test_docker_archive(images: Images, compress: Any) -> None:
    data = docker(SAMPLE, "demo:1", "demo.local/other:2")
    (loaded,) = await images.load(io.BytesIO(compress(data)))
    assert loaded.repo_tags == ("docker.io/library/demo:1", "demo.local/other:2")
    assert loaded.repo_digests == ()
    assert (images.lower_dirs(loaded)[0] / "b").read_bytes() == b"upper"
    assert loaded.size_bytes > 0


async def test_names_that_are_links(images: Images) -> None:
    single = image(SAMPLE.layers[0])
    (loaded,) = await images.load(io.BytesIO(docker(single, "demo", Layers=["again/layer.tar"])))
    assert (images.lower_dirs(loaded)[0] / "a").read_bytes() == b"lower"


async def test_an_image_without_a_name(images: Images) -> None:
    named = {"org.opencontainers.image.ref.name": "latest"}
    for data in (oci(SAMPLE, **named), oci(SAMPLE), docker(SAMPLE)):
        (loaded,) = await images.load(io.BytesIO(data))
        assert (loaded.repo_tags, loaded.repo_digests) == ((), ())


async def test_an_image_without_layers(images: Images) -> None:
    """No layers are null where Go wrote the list."""
    empty = image()
    for data in (oci(empty), docker(empty), docker(empty, Layers=None)):
        (loaded,) = await images.load(io.BytesIO(data))
        assert loaded.layers == ()
        await images.remove(loaded.id)


async def test_loading_twice_is_loading_once(images: Images) -> None:
    data = oci(SAMPLE, **{"io.containerd.image.name": "demo.local/a:1"})
    (first,) = await images.load(io.BytesIO(data))
    (second,) = await images.load(io.BytesIO(data))
    assert first == second
    assert images.list() == [first]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no archive" * 100,
        tars.archive(tars.file("a")),
        tars.archive(tars.file("index.json", b"{}")),
        tars.archive(tars.file("index.json", SAMPLE.top()[0])),
        tars.archive(tars.file("manifest.json", b"{}")),
        tars.archive(tars.file("manifest.json", b"\xff")),
        oci(SAMPLE, **{"io.containerd.image.name": "Bad Name"}),
        oci(SAMPLE)[:5000],
        docker(SAMPLE, "demo", Layers=["none", "1/layer.tar"]),
        docker(SAMPLE, "demo", Layers=["../../../../etc/passwd", "1/layer.tar"]),
        docker(SAMPLE, "demo", Layers=["0/layer.tar"]),
        docker(SAMPLE, "demo", Config="/etc/passwd"),
        docker(SAMPLE, "Bad Name"),
    ],
)
async def test_what_is_no_archive_of_images(place: Place, data: bytes) -> None:
    async with place.open() as images:
        with pytest.raises(InvalidArgument):
            await images.load(io.BytesIO(data))
    assert place.left("staging", "layers", "blobs/sha256") == []


async def test_no_image_for_this_node(images: Images) -> None:
    foreign = made.Image("a", ("1",), SAMPLE.layers, architectures=("s390x",))
    with pytest.raises(NotFound, match="s390x"):
        await images.load(io.BytesIO(oci(foreign)))


async def test_blobs_are_verified(images: Images) -> None:
    name = f"blobs/sha256/{tars.digest(b'expected')[7:]}"
    with pytest.raises(DataLoss, match="blobs/sha256"):
        await images.load(io.BytesIO(tars.archive(tars.file(name, b"other"))))


async def test_wrong_layers_are_found_out(place: Place) -> None:
    swapped = docker(SAMPLE, "demo", Layers=["1/layer.tar", "0/layer.tar"])
    async with place.open() as images:
        with pytest.raises(DataLoss):
            await images.load(io.BytesIO(swapped))
    assert place.left("staging", "layers", "blobs/sha256") == []


async def test_too_many_files(images: Images) -> None:
    with pytest.raises(ResourceExhausted):
        await images.load(io.BytesIO(tars.archive(*[tars.symlink("a", "b")] * 10_001)))


def test_a_command_that_fails_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "notes.tar"
    file.write_bytes(tars.archive(tars.file("notes", b"")))
    config = Config(root=str(tmp_path / "root"), state=str(tmp_path / "state"))
    with pytest.raises(InvalidArgument, match=rf"^{file}: archive: has neither index\.json"):
        control.load(config, str(file))
