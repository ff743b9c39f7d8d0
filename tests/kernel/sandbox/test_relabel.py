"""SELinux labels of volumes: a kernel keeps the attribute, and shows what was asked for, without SELinux as well."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from nodeagent.errors import FailedPrecondition, InvalidArgument
from nodeagent.linux import mounts, syscalls
from nodeagent.sandbox import rootfs_defaults
from nodeagent.sandbox.init import relabel
from nodeagent.sandbox.spec import Mount
from tests.kernel.sandbox.conftest import Plan
from tests.kernel.sandbox.containers import run, start, v1_hierarchies

MINE = "system_u:object_r:container_file_t:s0:c1,c2"
OTHER = "system_u:object_r:container_file_t:s0:c3,c4"

pytestmark = pytest.mark.skipif(
    Path("/sys/fs/selinux/enforce").exists(), reason="labels have to be of the policy here"
)


def label(path: Path) -> str:
    try:
        return os.getxattr(path, relabel.ATTRIBUTE, follow_symlinks=False).decode()
    except OSError:
        return ""


def relabelled(path: Path, wanted: str = MINE) -> None:
    root = os.open(path, os.O_PATH)
    try:
        relabel.relabel_tree(root, wanted, str(path))
    finally:
        os.close(root)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    path = tmp_path / "tree"
    (path / "deep/deeper").mkdir(parents=True)
    (path / "deep/file").write_text("content")
    return path


@pytest.fixture
def mounted(tree: Path) -> Iterator[Path]:
    """A file system of its own in the tree."""
    point = tree / "deep/mounted"
    point.mkdir()
    mount = mounts.make_filesystem("tmpfs")
    target = os.open(point, os.O_PATH)
    syscalls.move_mount(mount, target)
    os.close(target)
    os.close(mount)
    (point / "file").touch()
    yield point
    syscalls.umount2(str(point), syscalls.MNT_DETACH)


def test_every_file_of_a_tree(tree: Path) -> None:
    os.mkfifo(tree / "pipe")
    os.mknod(tree / "device", 0o600 | 0o020000, os.makedev(1, 3))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tree / "socket"))
    (tree / "deep" / "name with a\nline feed").touch()
    (tree / "deep" / os.fsdecode(b"\xff")).touch()
    os.setxattr(tree / "deep/file", relabel.ATTRIBUTE, OTHER.encode() + b"\0")
    relabelled(tree)
    found = [tree, *tree.rglob("*")]
    assert len(found) == 9
    assert {label(path) for path in found} == {MINE}


def test_one_file(tree: Path) -> None:
    relabelled(tree / "deep/file")
    assert label(tree / "deep/file") == MINE
    assert label(tree / "deep") == ""


def test_a_link_has_a_label_and_what_it_leads_to_keeps_its_own(tree: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    (tree / "link").symlink_to(outside)
    (tree / "deep/link").symlink_to(outside / "file")
    relabelled(tree)
    assert label(tree / "link") == label(tree / "deep/link") == MINE
    assert label(outside) == label(outside / "file") == ""


def test_a_mount_in_the_tree_keeps_its_own(tree: Path, mounted: Path) -> None:
    relabelled(tree)
    assert label(mounted) == label(mounted / "file") == ""
    assert label(tree / "deep/file") == MINE


def test_files_with_the_label_are_not_written_to(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only volume that has its labels can be mounted; what others have made in it gets the label."""
    relabelled(tree)
    (tree / "deep/new").touch()
    written = []
    write = os.setxattr

    def setxattr(name: str, attribute: str, value: bytes) -> None:
        written.append(os.readlink(name))
        write(name, attribute, value)

    monkeypatch.setattr(os, "setxattr", setxattr)
    relabelled(tree)
    assert written == [str(tree / "deep/new")]


def test_a_file_system_without_labels() -> None:
    root = os.open("/proc/self/fdinfo", os.O_PATH)
    relabel.relabel_tree(root, MINE, "/proc")
    os.close(root)


def test_a_file_that_cannot_have_it_is_named(tree: Path) -> None:
    directory = mounts.clone_tree(os.open(tree, os.O_PATH))
    mounts.set_attributes(directory, ["ro"])
    with pytest.raises(FailedPrecondition, match=f'"{tree}": Read-only file system'):
        relabel.relabel_tree(directory, MINE, str(tree))
    os.close(directory)


def test_depth_is_bounded_and_descriptors_are_given_back(tree: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for extra, refused in ((relabel.MAX_DEPTH - 3, False), (relabel.MAX_DEPTH, True)):
        path = tree / str(extra)
        path.mkdir()
        here = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        for _ in range(extra):
            os.mkdir("d", dir_fd=here)
            inner = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
            os.close(here)
            here = inner
        os.close(here)
        if refused:
            with pytest.raises(FailedPrecondition, match="is deeper than"):
                relabelled(tree)
        else:
            relabelled(tree)
    assert len(os.listdir("/proc/self/fd")) == before


def test_nothing_outside_is_labelled_whatever_a_name_means_meanwhile(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container swaps a directory for a link at the moment between its being listed and its being opened."""
    outside = tmp_path / "outside"
    (outside / "deeper").mkdir(parents=True)
    (outside / "file").touch()
    opened = []
    openat2 = syscalls.openat2

    def swapped(directory: int, path: str, flags: int, *, resolve: int, mode: int = 0) -> int:
        opened.append(path)
        if path == "deep":
            (tree / "deep").rename(tree / "moved")
            (tree / "deep").symlink_to(outside)
        return openat2(directory, path, flags, resolve=resolve, mode=mode)

    monkeypatch.setattr(syscalls, "openat2", swapped)
    relabelled(tree)
    assert "deep" in opened
    assert label(tree / "deep") == MINE
    assert label(outside) == label(outside / "file") == label(outside / "deeper") == ""


def test_what_vanishes_meanwhile_is_passed_over(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openat2 = syscalls.openat2

    def vanished(directory: int, path: str, flags: int, *, resolve: int, mode: int = 0) -> int:
        if path == "file":
            (tree / "deep/file").unlink()
        return openat2(directory, path, flags, resolve=resolve, mode=mode)

    monkeypatch.setattr(syscalls, "openat2", vanished)
    relabelled(tree)
    assert not (tree / "deep/file").exists()
    assert label(tree / "deep/deeper") == MINE


def test_a_container_that_keeps_changing_the_tree(tree: Path, tmp_path: Path) -> None:
    """Whoever wins: only what is in the tree gets the label, and nothing fails."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    (tree / "swap").mkdir()
    (tree / "link").symlink_to(outside)
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for old, new in (("swap", "x"), ("link", "swap"), ("x", "link")):
                os.rename(tree / old, tree / new)
            (tree / "new").touch()
            (tree / "new").unlink()
            for old, new in (("swap", "x"), ("link", "swap"), ("x", "link")):
                os.rename(tree / old, tree / new)

    container = threading.Thread(target=swap)
    container.start()
    try:
        for number in range(300):
            relabelled(tree, MINE if number % 2 else OTHER)
    finally:
        stop.set()
        container.join()
    assert label(outside) == label(outside / "file") == ""


@pytest.mark.parametrize("path", ["/etc", "/bin", "/usr/lib", "/tmp/..", "/proc/self/root"])
def test_what_the_node_lives_on_is_refused_by_whatever_name(path: str) -> None:
    root = os.open(path, os.O_PATH)
    with pytest.raises(InvalidArgument, match=f'selinux_relabel of "{path}"'):
        relabel.require_relabelable(root, path)
    os.close(root)


# ---- in the plan of a container ----


def bind(source: Path, target: str) -> Mount:
    return cast(Mount, {**rootfs_defaults.bind(str(source), target), "label": MINE})


def with_mounts(*added: Mount) -> list[Mount]:
    return [*rootfs_defaults.default_mounts(False, v1_hierarchies()), *added]


def test_a_volume_is_labelled_before_its_container_begins(
    plan: Plan, tree: Path, tmp_path: Path
) -> None:
    absent = bind(tmp_path / "absent", "/absent")
    absent["absent"] = "make"
    (tmp_path / "bare").mkdir()
    bare = rootfs_defaults.bind(str(tmp_path / "bare"), "/bare")
    made = plan("cat /data/deep/file", mounts=with_mounts(bind(tree, "/data"), absent, bare))
    assert run(made)[1] == "content"
    assert label(tree / "deep/file") == label(tmp_path / "absent") == MINE
    assert label(tmp_path / "bare") == ""


def test_a_container_that_would_take_the_node_s_labels(plan: Plan) -> None:
    with start(plan("true", mounts=with_mounts(bind(Path("/etc"), "/data")))) as process:
        assert process.message["error"] == "InvalidArgument"
        assert "programs of the node need the labels" in process.message["text"]
    assert label(Path("/etc")) == ""
