"""Mounts below the agent's directories are found, told from those of others, and detached without following a link."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from nodeagent.lifecycle import own_mounts
from nodeagent.linux import mountinfo, syscalls


@pytest.fixture
def mounted() -> Iterator["Mounts"]:
    with ExitStack() as stack:
        yield Mounts(stack)


class Mounts:
    """Makes mounts; those that are left are detached at the end."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def __call__(self, point: Path) -> str:
        point.mkdir(parents=True, exist_ok=True)
        syscalls.mount("stray", str(point), "tmpfs", 0, "size=4096")
        self._stack.callback(_gone, str(point))
        return str(point)


def _gone(point: str) -> None:
    if point in points():
        syscalls.umount2(point, syscalls.MNT_DETACH)


def points() -> list[str]:
    return [mount.point for mount in mountinfo.parse(mountinfo.table())]


def test_mounts_are_found_in_entries_of_the_directories_only(
    tmp_path: Path, mounted: Mounts
) -> None:
    containers, trash = tmp_path / "containers", tmp_path / "trash"
    mounted(containers)
    here = mounted(containers / "a" / "upper" / "b c")
    there = mounted(trash / "d")
    for other in ("layers/a", "containers-of-others/a"):
        mounted(tmp_path / other)
    assert own_mounts.below([containers, trash]) == {here: containers / "a", there: trash / "d"}


def test_what_is_detached_goes_with_all_that_is_in_it(tmp_path: Path, mounted: Mounts) -> None:
    outer = mounted(tmp_path / "a")
    inner = mounted(tmp_path / "a" / "b")
    other = mounted(tmp_path / "c")
    held = os.open(outer, os.O_RDONLY | os.O_DIRECTORY)  # it is in use
    try:
        assert own_mounts.detach(outer)
    finally:
        os.close(held)
    assert {outer, inner}.isdisjoint(points())
    assert other in points()
    assert not own_mounts.detach(inner)


def test_mounts_over_one_another_are_detached_one_by_one(tmp_path: Path, mounted: Mounts) -> None:
    point = mounted(tmp_path / "a")
    mounted(tmp_path / "a")
    assert [own_mounts.detach(point) for _ in range(3)] == [True, True, False]


def test_a_file_can_be_a_mount_point(tmp_path: Path, mounted: Mounts) -> None:
    point = str(tmp_path / "net")
    os.close(os.open(point, os.O_CREAT | os.O_CLOEXEC))
    syscalls.mount("/proc/self/ns/net", point, "", syscalls.MS_BIND)
    assert own_mounts.detach(point)
    assert point not in points()


@pytest.mark.parametrize("linked", ["above", "itself"])
def test_a_link_that_a_container_has_put_there_is_not_followed(
    tmp_path: Path, mounted: Mounts, monkeypatch: pytest.MonkeyPatch, linked: str
) -> None:
    """The path of a mount may lead through files of a container, which can change after the table was read."""
    victim = mounted(tmp_path / "victim" / "x")
    point = mounted(tmp_path / "upper" / "x")
    table = mountinfo.table()
    monkeypatch.setattr(mountinfo, "table", lambda: table)
    syscalls.umount2(point, syscalls.MNT_DETACH)
    if linked == "above":
        (tmp_path / "upper").rename(tmp_path / "before")
        (tmp_path / "upper").symlink_to("victim")
    else:
        Path(point).rmdir()
        Path(point).symlink_to(victim)
    assert not own_mounts.detach(point)
    monkeypatch.undo()
    assert victim in points()


def test_another_mount_at_the_path_is_left(
    tmp_path: Path, mounted: Mounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = mounted(tmp_path / "x")
    table = mountinfo.table()
    mounted(tmp_path / "x")  # which the table, read before, does not have
    monkeypatch.setattr(mountinfo, "table", lambda: table)
    assert not own_mounts.detach(point)
    monkeypatch.undo()
    assert points().count(point) == 2
