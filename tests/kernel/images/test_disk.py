"""A disk that is too small, and what a pull leaves on it."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from nodeagent import disk_reserve
from nodeagent.errors import ResourceExhausted
from nodeagent.linux import syscalls
from tests.support import images as made
from tests.support import tars
from tests.support.fake_registry import Server, image, layer, serving
from tests.support.places import Place

ZEROS = bytes(40 << 20)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    syscalls.mount("tmpfs", str(folder), "tmpfs", 0, "size=16m,nr_inodes=600")
    yield folder
    syscalls.umount2(str(folder), syscalls.MNT_DETACH)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving() as started:
        yield started


@pytest.mark.parametrize("reserve", [True, False])
@pytest.mark.parametrize(
    "entries", [[tars.file("zeros", ZEROS)], [tars.file(f"{n}") for n in range(900)]]
)
async def test_a_full_disk(
    small_disk: Path,
    server: Server,
    entries: list[tars.Member],
    reserve: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not reserve:  # the kernel is who says so
        monkeypatch.setattr(disk_reserve, "_RESERVE_BYTES", -(1 << 40))
    server.add(image(layer(tars.file("small")), layer(*entries)))
    server.add(image(layer(tars.file("small")), tag="2"))
    place = Place(small_disk)
    async with place.open() as images:
        before = os.statvfs(small_disk)
        with pytest.raises(ResourceExhausted):
            await images.pull(f"{server.host}/test/image:1")
        after = os.statvfs(small_disk)
        assert place.left("staging", "layers", "blobs/sha256") == []
        assert after.f_ffree == before.f_ffree
        assert before.f_bfree - after.f_bfree < 20  # pages of the database
        await images.pull(f"{server.host}/test/image:2")


async def test_what_can_not_fit_is_not_begun(small_disk: Path, server: Server) -> None:
    big = image(layer(tars.file("random", random.Random(1).randbytes(20 << 20))))
    server.add(big)
    place = Place(small_disk)
    async with place.open() as images:
        with pytest.raises(ResourceExhausted, match="needed"):
            await images.pull(f"{server.host}/test/image:1")
        assert not server.asked(tars.digest(big.layers[0].blob))


def test_a_sparse_file_below_fills_no_disk(small_disk: Path) -> None:
    """Some hundred bytes of blobs: a hole larger than the disk, and a hard link to it in a layer above."""
    workshop = tars.Workshop(small_disk)
    sparse = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(64 << 20)}
    workshop.unpack(tars.file("a", b"x", pax_headers=sparse))
    before = os.statvfs(small_disk)
    root = workshop.unpack(tars.link("b", "a"))
    assert (root / "b").stat().st_size == 64 << 20
    assert before.f_bfree - os.statvfs(small_disk).f_bfree < 10


def test_a_copy_that_does_not_fit_is_not_begun(small_disk: Path) -> None:
    workshop = tars.Workshop(small_disk)
    workshop.unpack(tars.file("a", b"x" * (10 << 20)))
    before = os.statvfs(small_disk)
    with pytest.raises(ResourceExhausted, match="needed"):
        workshop.unpack(tars.link("b", "a"))
    assert before.f_bfree - os.statvfs(small_disk).f_bfree < 10


async def test_an_archive_that_does_not_fit(small_disk: Path, tmp_path: Path) -> None:
    file = tmp_path / "archive.tar"
    made.write_archive(image(layer(tars.file("random", os.urandom(20 << 20)))), file)
    place = Place(small_disk)
    async with place.open() as images:
        with pytest.raises(ResourceExhausted):
            await images.load(file)
    assert place.left("staging", "layers") == []
