"""Paths below a root that somebody else fills."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent.linux import confined


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """The directory that has the root, and things outside of it."""
    (tmp_path / "root" / "inside").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    return tmp_path


@pytest.fixture
def root(top: Path) -> Iterator[int]:
    descriptor = os.open(top / "root", os.O_PATH | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


def where(descriptor: int, top: Path) -> str:
    """The path of an open file relative to `top`; the descriptor is closed."""
    path = os.readlink(f"/proc/self/fd/{descriptor}")
    os.close(descriptor)
    return os.path.relpath(path, top)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/inside", "root/inside"),
        ("inside", "root/inside"),
        ("/", "root"),
        ("../../outside/../inside", None),
        ("/../inside", "root/inside"),
        ("../../../../inside", "root/inside"),
    ],
)
def test_open_path(top: Path, root: int, path: str, expected: str | None) -> None:
    if expected is None:
        with pytest.raises(FileNotFoundError):
            confined.open_path(root, path)
    else:
        assert where(confined.open_path(root, path), top) == expected


@pytest.mark.parametrize(
    ("link", "path", "expected"),
    [
        ("/inside", "link/new", "root/inside/new"),
        ("inside", "link/new", "root/inside/new"),
        ("../../../..", "link/new", "root/new"),
        ("/absent/deep", "link/new", "root/absent/deep/new"),
        ("/absent/deep", "link", "root/absent/deep"),
        ("../../outside", "link/new", "root/outside/new"),
        ("./inside/../other", "link", "root/other"),
        ("link2", "link", "root/target"),
    ],
)
def test_make_path_through_links(top: Path, root: int, link: str, path: str, expected: str) -> None:
    (top / "root" / "link").symlink_to(link)
    (top / "root" / "link2").symlink_to("/target")
    assert where(confined.make_path(root, path, directory=True), top) == expected
    assert os.listdir(top / "outside") == []
    assert (top / expected).is_dir()


def test_make_path_of_files(top: Path, root: int) -> None:
    old = os.umask(0)
    try:
        assert where(confined.make_path(root, "/a/b/file", directory=False), top) == "root/a/b/file"
    finally:
        os.umask(old)
    made = (top / "root" / "a" / "b" / "file").stat()
    assert stat.S_ISREG(made.st_mode)
    assert stat.S_IMODE(made.st_mode) == 0o644
    assert stat.S_IMODE((top / "root" / "a").stat().st_mode) == 0o755


def test_what_exists_is_kept(top: Path, root: int) -> None:
    file = top / "root" / "file"
    file.write_text("kept")
    os.close(confined.make_path(root, "/file", directory=False))
    assert file.read_text() == "kept"
    with pytest.raises(NotADirectoryError):
        confined.make_path(root, "/file/below", directory=True)


def test_dangling_link_to_a_file(top: Path, root: int) -> None:
    """/etc/resolv.conf of many images is such a link."""
    (top / "root" / "resolv.conf").symlink_to("../run/systemd/resolve/stub-resolv.conf")
    made = confined.make_path(root, "/resolv.conf", directory=False)
    assert where(made, top) == "root/run/systemd/resolve/stub-resolv.conf"


def test_without_links(top: Path, root: int) -> None:
    (top / "root" / "link").symlink_to("inside")
    (top / "root" / "dangling").symlink_to("absent")
    with pytest.raises(OSError, match="symbolic links"):
        confined.open_path(root, "link", follow=False)
    for path in ("link/new", "dangling", "dangling/new"):
        with pytest.raises(OSError, match="symbolic links"):
            confined.make_path(root, path, directory=True, follow=False)
    assert (
        where(confined.make_path(root, "new/er", directory=True, follow=False), top)
        == "root/new/er"
    )


def test_a_circle_of_links_ends(top: Path, root: int) -> None:
    (top / "root" / "a").symlink_to("b/x")
    (top / "root" / "b").symlink_to("a/y")
    for call in (confined.open_path, lambda r, p: confined.make_path(r, p, directory=True)):
        with pytest.raises(OSError, match="symbolic links"):
            call(root, "a")


def test_links_of_procfs_to_open_files_are_not_followed(root: int) -> None:
    proc = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY)
    try:
        for path in ("cwd", f"fd/{root}", "exe"):
            with pytest.raises(OSError, match="openat2"):
                confined.open_path(proc, path)
    finally:
        os.close(proc)


def test_no_descriptor_is_left(root: int) -> None:
    before = os.listdir("/proc/self/fd")
    os.close(confined.make_path(root, "/a/b/c", directory=True))
    os.close(confined.make_path(root, "/a/f", directory=False))
    with pytest.raises(NotADirectoryError):
        confined.make_path(root, "/a/f/x/y", directory=True)
    assert os.listdir("/proc/self/fd") == before
