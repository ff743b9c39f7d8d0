"""Atomic files and the removal of trees, as far as they need no privilege."""

import contextlib
import os
import stat
import threading
from pathlib import Path

import pytest

from nodeagent.files import (
    ensure_directory,
    narrow,
    read_bounded,
    remove_tree,
    sync_directory,
    write_atomic,
)


def test_write_atomic_creates_with_the_mode_whatever_the_umask(tmp_path: Path) -> None:
    target = tmp_path / "file"
    old = os.umask(0o077)
    try:
        write_atomic(str(target), b"data", mode=0o664)
    finally:
        os.umask(old)
    assert target.read_bytes() == b"data"
    assert stat.S_IMODE(target.stat().st_mode) == 0o664


def test_write_atomic_replaces_and_leaves_no_other_name(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    write_atomic(str(target), b"n" * 100_000, sync=False)
    assert target.read_bytes() == b"n" * 100_000
    assert os.listdir(tmp_path) == ["file"]


def test_write_atomic_replaces_a_link_not_what_it_points_to(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"untouched")
    link = tmp_path / "link"
    link.symlink_to(outside)
    write_atomic(str(link), b"new")
    assert outside.read_bytes() == b"untouched"
    assert not link.is_symlink()


def test_write_atomic_that_fails_keeps_the_old_and_cleans_up(tmp_path: Path) -> None:
    target = tmp_path / "directory"
    target.mkdir()
    with pytest.raises(OSError, match="directory"):
        write_atomic(str(target), b"x")
    assert os.listdir(tmp_path) == ["directory"]


def test_write_atomic_of_a_bare_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_atomic("name", b"x")
    assert (tmp_path / "name").read_bytes() == b"x"


def test_ensure_directory_makes_parents_and_accepts_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    ensure_directory(str(path), mode=0o700)
    ensure_directory(str(path), mode=0o755)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


@pytest.mark.parametrize("kind", ["file", "link"])
def test_ensure_directory_refuses_what_is_no_directory(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    path.touch() if kind == "file" else path.symlink_to(tmp_path)
    with pytest.raises(NotADirectoryError, match=str(path)):
        ensure_directory(str(path))


def test_ensure_directory_makes_with_the_mode_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        ensure_directory(str(tmp_path / "above/below"), mode=0o711)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "above/below").stat().st_mode) == 0o711
    assert stat.S_IMODE((tmp_path / "above").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("before", "mode", "after"),
    [(0o755, 0o700, 0o700), (0o4755, 0o711, 0o711), (0o500, 0o711, 0o500), (0o600, 0o600, 0o600)],
)
def test_narrow_takes_and_never_gives(tmp_path: Path, before: int, mode: int, after: int) -> None:
    path = tmp_path / "file"
    path.touch()
    path.chmod(before)
    narrow(str(path), mode)
    assert stat.S_IMODE(path.stat().st_mode) == after
    narrow(str(tmp_path / "absent"), mode)


def test_sync_directory_names_what_is_missing(tmp_path: Path) -> None:
    sync_directory(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="absent"):
        sync_directory(str(tmp_path / "absent"))


def test_remove_tree_of_nothing_is_done(tmp_path: Path) -> None:
    remove_tree(str(tmp_path / "absent"))
    remove_tree(str(tmp_path / "absent" / "below"))


def test_remove_tree_takes_every_kind_of_file(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "directory" / "empty").mkdir(parents=True)
    (tree / "directory" / "file").write_bytes(b"x")
    os.mkfifo(tree / "fifo")
    os.link(tree / "directory" / "file", tree / "hardlink")
    (tree / "dangling").symlink_to("nowhere")
    os.mkdir(os.fsencode(tree) + b"/\xff\xfe")
    remove_tree(f"{tree}/")
    assert os.listdir(tmp_path) == []


def test_remove_tree_of_a_file_and_of_a_link(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    link = tmp_path / "link"
    link.symlink_to(file)
    remove_tree(str(link))
    assert file.exists()
    remove_tree(str(file))
    assert os.listdir(tmp_path) == []


def test_remove_tree_never_follows_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "directory").mkdir(parents=True)
    (outside / "file").touch()
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "absolute").symlink_to(outside)
    (tree / "relative").symlink_to("../outside/directory")
    top = tmp_path / "top"
    top.symlink_to(outside)
    remove_tree(str(tree))
    remove_tree(str(top))
    assert sorted(os.listdir(outside)) == ["directory", "file"]
    assert os.listdir(tmp_path) == ["outside"]


def make_deep(tree: Path, depth: int) -> None:
    """Directories far deeper than PATH_MAX allows to name at once."""
    tree.mkdir()
    current = os.open(tree, os.O_DIRECTORY)
    for _ in range(depth):
        os.mkdir("directory", dir_fd=current)
        os.close(os.open("file", os.O_CREAT, dir_fd=current))
        child = os.open("directory", os.O_DIRECTORY, dir_fd=current)
        os.close(current)
        current = child
    os.close(current)


def test_remove_tree_of_any_depth_with_few_descriptors(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    make_deep(tree, 2000)
    before = len(os.listdir("/proc/self/fd"))
    remove_tree(str(tree))
    assert not tree.exists()
    assert len(os.listdir("/proc/self/fd")) == before


def test_two_removals_of_one_tree_do_not_disturb_each_other(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for number in range(200):
        (tree / str(number) / "below").mkdir(parents=True)
        (tree / str(number) / "file").touch()
    failures: list[OSError] = []

    def remove() -> None:
        try:
            remove_tree(str(tree))
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=remove) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert not tree.exists()


def test_a_directory_swapped_for_a_link_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    tree = tmp_path / "tree"
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError):
                os.rename(tree / "victim", tree / "aside")
                os.symlink(outside, tree / "victim")
                os.unlink(tree / "victim")
                os.rename(tree / "aside", tree / "victim")

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        for _ in range(100):
            with contextlib.suppress(OSError):
                (tree / "new" / "below").mkdir(parents=True)
                os.rename(tree / "new", tree / "victim")
            with contextlib.suppress(OSError):
                remove_tree(str(tree))
    finally:
        stop.set()
        swapper.join()
    assert os.listdir(outside) == ["precious"]


@pytest.mark.parametrize("path", ["", "/", ".", "..", "a/.."])
def test_remove_tree_refuses_paths_without_a_name(path: str) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        remove_tree(path)


def test_read_bounded_takes_regular_files_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bounded(str(path), 5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_bounded(str(path), 4)


def test_read_bounded_waits_for_nobody(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (fifo, tmp_path):
        with pytest.raises(OSError, match="not a regular file"):
            read_bounded(str(path), 5)
