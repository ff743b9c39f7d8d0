"""The size of a writable layer, as du(1) tells it."""

import asyncio
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent import files
from nodeagent.lifecycle.usage import disk
from nodeagent.lifecycle.usage.disk import Disks, measure
from nodeagent.tasks import Tasks


def du(directory: Path) -> tuple[int, int]:
    """Bytes and inodes below a directory."""
    sizes = [
        int(subprocess.check_output(["du", "-s", *options, directory]).split()[0])
        for options in (["--block-size=1"], ["--inodes"])
    ]
    return sizes[0] - directory.stat().st_blocks * 512, sizes[1] - 1


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    directory = tmp_path / "id/upper"
    directory.mkdir(parents=True)
    return directory


def test_names_holes_and_links(layer: Path, tmp_path: Path) -> None:
    (layer / "etc/deep").mkdir(parents=True)
    (layer / "var").mkdir()
    (layer / "var/log").write_bytes(b"x" * 5_000)
    (layer / "etc/deep/file").write_bytes(b"x" * 300_000)
    for name in ("a", "etc/b", "etc/deep/c"):
        os.link(layer / "etc/deep/file", layer / name)
    with (layer / "hole").open("wb") as file:
        file.truncate(1 << 30)
    (layer / "link").symlink_to("/usr")
    usage = measure(layer)
    assert (usage.used_bytes, usage.inodes_used) == du(layer)
    assert usage.inodes_used == 7
    assert usage.mountpoint == str(tmp_path)


def test_the_volumes_of_the_image_count(layer: Path, tmp_path: Path) -> None:
    volumes = layer.parent / "volumes"
    assert measure(layer, volumes).used_bytes == 0
    (volumes / "0/deep").mkdir(parents=True)
    (volumes / "0/deep/file").write_bytes(b"x" * 300_000)
    (layer / "file").write_bytes(b"x" * 5_000)
    usage = measure(layer, volumes)
    sizes = zip(du(layer), du(volumes), strict=True)
    assert (usage.used_bytes, usage.inodes_used) == tuple(map(sum, sizes))
    assert usage.mountpoint == str(tmp_path)


def test_files_with_several_names_beyond_those_that_are_remembered(
    layer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A walk's memory is not the container's to choose; the sum is right all the same."""
    monkeypatch.setattr(disk, "REMEMBERED", 10)
    (layer / "names").mkdir()
    for number in range(50):
        (layer / f"file-{number}").write_bytes(b"x" * 5_000)
        for name in range(number % 3 + 1):
            os.link(layer / f"file-{number}", layer / f"names/{number}-{name}")
    usage = measure(layer)
    assert (usage.used_bytes, usage.inodes_used) == du(layer)


def test_a_walk_remembers_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "REMEMBERED", 10)
    linked: set[int] = set()
    pairs = [os.stat_result((0o100644, inode, 1, 2, 0, 0, 0, 0, 0, 0)) for inode in range(1000)]
    shares = [disk._share(status, linked) for status in pairs]
    assert shares == [1.0] * 10 + [0.5] * 990
    assert len(linked) == 10


def test_a_layer_that_has_gone(tmp_path: Path) -> None:
    usage = measure(tmp_path / "id/upper")
    assert (usage.used_bytes, usage.inodes_used) == (0, 0)


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (500, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.usefixtures("few_descriptors")
def test_directories_nest_deeper_than_there_are_descriptors(layer: Path) -> None:
    levels = 2_000
    here = os.open(layer, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("beside", dir_fd=here)
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    assert measure(layer).inodes_used == 2 * levels
    files.remove_tree(str(layer))


def test_a_directory_that_is_moved_leads_nowhere_else(layer: Path, tmp_path: Path) -> None:
    (layer / "a/b").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/file").touch()
    walk = disk._Walk(layer)
    seen = 0
    for _ in walk:
        seen += 1
        if seen == 2:
            (layer / "a/b").rename(tmp_path / "elsewhere/b")
    assert seen == 2


async def test_a_long_walk_holds_up_nobody(
    layer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "FIRST_SECONDS", 0.01)
    disks = Disks(tmp_path, Tasks())
    async with disks._turns, disks._turns:
        usage = await disks.usage("id")
        assert (usage.mountpoint, usage.used_bytes) == (str(tmp_path), None)
        assert (await disks.usage("id")).used_bytes is None
    (layer / "file").touch()
    async with asyncio.timeout(60):
        while (await disks.usage("id")).inodes_used is None:  # noqa: ASYNC110, nobody else tells
            await asyncio.sleep(0.01)
    assert (await disks.usage("id")).inodes_used == 1


async def test_what_has_gone_is_forgotten(layer: Path, tmp_path: Path) -> None:
    disks = Disks(tmp_path, Tasks())
    for name in ("id", "gone"):
        await disks.usage(name)
    disks.keep({"id"})
    assert disks._layers.keys() == {"id"}


async def test_a_layer_that_cannot_be_walked_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(directory: Path, *_: Path) -> disk.DiskUsage:
        raise OSError(5, "Input/output error", str(directory))

    monkeypatch.setattr(disk, "DISK_SECONDS", 0)
    disks = Disks(tmp_path, Tasks())
    with monkeypatch.context() as patch:
        patch.setattr(disk, "measure", fail)
        for _ in range(3):
            assert (await disks.usage("id")).used_bytes is None
    assert len(caplog.messages) == 1
    (tmp_path / "id/upper").mkdir(parents=True)
    assert (await disks.usage("id")).used_bytes == 0
