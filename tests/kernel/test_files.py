"""Removal of trees that mounts, and the immutable flag, protect."""

import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent.files import remove_tree
from nodeagent.linux import syscalls

FS_IOC_SETFLAGS = 0x40086602
FS_IMMUTABLE_FL = 0x10


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    path = tmp_path / "precious"
    path.mkdir()
    (path / "file").write_text("precious")
    return path


@pytest.fixture
def mounted(tmp_path: Path, precious: Path) -> Iterator[Path]:
    """tree/deep/point, with `precious` mounted on it."""
    point = tmp_path / "tree" / "deep" / "point"
    point.mkdir(parents=True)
    syscalls.mount(str(precious), str(point), "", syscalls.MS_BIND)
    yield point
    syscalls.umount2(str(point), syscalls.MNT_DETACH)


def test_a_mount_inside_is_left_and_named(tmp_path: Path, precious: Path, mounted: Path) -> None:
    (tmp_path / "tree" / "other").mkdir()
    (tmp_path / "tree" / "deep" / "file").touch()
    with pytest.raises(OSError, match=f"busy: '{mounted}'"):
        remove_tree(str(tmp_path / "tree"))
    assert (precious / "file").read_text() == "precious"
    assert os.listdir(tmp_path / "tree") == ["deep"]
    assert os.listdir(tmp_path / "tree" / "deep") == ["point"]


def test_a_tree_that_is_a_mount_is_left(precious: Path, mounted: Path) -> None:
    with pytest.raises(OSError, match=f"busy: '{mounted}'"):
        remove_tree(str(mounted))
    assert (precious / "file").read_text() == "precious"


def test_a_file_that_is_a_mount_is_left(tmp_path: Path, precious: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").touch()
    syscalls.mount(str(precious / "file"), str(tree / "file"), "", syscalls.MS_BIND)
    try:
        with pytest.raises(OSError, match="busy"):
            remove_tree(str(tree))
    finally:
        syscalls.umount2(str(tree / "file"), syscalls.MNT_DETACH)
    assert (precious / "file").read_text() == "precious"


def test_a_tree_below_a_mount_can_be_removed(precious: Path, mounted: Path) -> None:
    (mounted / "tree" / "below").mkdir(parents=True)
    remove_tree(str(mounted / "tree"))
    assert os.listdir(precious) == ["file"]


def test_directories_without_permissions_are_removed(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "closed" / "below").mkdir(parents=True)
    (tree / "closed").chmod(0)
    remove_tree(str(tree))
    assert not tree.exists()


def test_an_immutable_file_is_left_and_named(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "directory").mkdir(parents=True)
    immutable = tree / "immutable"
    with immutable.open("w") as file:
        fcntl.ioctl(file, FS_IOC_SETFLAGS, struct.pack("l", FS_IMMUTABLE_FL))
        try:
            with pytest.raises(PermissionError, match=str(immutable)):
                remove_tree(str(tree))
            assert os.listdir(tree) == ["immutable"]
        finally:
            fcntl.ioctl(file, FS_IOC_SETFLAGS, struct.pack("l", 0))
