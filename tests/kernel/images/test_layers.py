"""Layers unpacked on the real file system, and seen through a real overlay mount."""

import gzip
import os
import stat
import struct
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zstandard

from nodeagent.errors import DataLoss, InvalidArgument
from nodeagent.images.unpack.whiteouts import is_whiteout
from nodeagent.linux import mounts, syscalls
from tests.support.tars import (
    Member,
    Workshop,
    archive,
    char,
    digest,
    directory,
    file,
    link,
    member,
    symlink,
)


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


@contextmanager
def overlay(workshop: Workshop) -> Iterator[Path]:
    """The layers as a container sees them."""
    target = workshop.folder / "merged"
    target.mkdir()
    descriptors = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in workshop.below]
    if len(descriptors) == 1:
        empty = workshop.folder / "empty"
        empty.mkdir()
        descriptors.append(os.open(empty, os.O_RDONLY | os.O_CLOEXEC))
    root = mounts.mount_overlay(str(target), descriptors)
    try:
        yield target
    finally:
        os.close(root)
        syscalls.umount2(str(target), syscalls.MNT_DETACH)
        for descriptor in descriptors:
            os.close(descriptor)


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path))


def test_everything_a_layer_can_have(workshop: Workshop) -> None:
    root = workshop.unpack(
        directory("./", mode=0o750, uid=7),
        directory("dir", mode=0o1777, uid=5, gid=6, mtime=1000),
        file("dir/file", b"content", mode=0o6755, uid=1, gid=2, mtime=2000),
        link("dir/link", "dir/file"),
        symlink("dir/absolute", "/dir/file", uid=3, mtime=3000),
        symlink("out", "../../../../etc/passwd"),
        char("null", 1, 3, mode=0o666, gid=9),
        member("disk", tarfile.BLKTYPE, devmajor=8, devminor=1, mode=0o660),
        member("pipe", tarfile.FIFOTYPE, mode=0o622),
        file("late/file", b"x"),
    )
    status = root.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o750, 7)
    status = (root / "dir").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o1777, 5, 6)
    assert status.st_mtime == 1000
    status = (root / "dir/file").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o6755, 1, 2)
    assert (status.st_mtime, status.st_nlink) == (2000, 2)
    assert (root / "dir/link").read_bytes() == b"content"
    status = (root / "dir/absolute").lstat()
    assert (os.readlink(root / "dir/absolute"), status.st_uid) == ("/dir/file", 3)
    assert status.st_mtime == 3000
    assert os.readlink(root / "out") == "../../../../etc/passwd"
    status = (root / "null").stat()
    assert (status.st_mode, status.st_rdev) == (stat.S_IFCHR | 0o666, os.makedev(1, 3))
    assert stat.S_ISBLK((root / "disk").stat().st_mode)
    assert (root / "pipe").stat().st_mode == stat.S_IFIFO | 0o622


def test_the_umask_does_not_matter(workshop: Workshop) -> None:
    umask = os.umask(0o077)
    try:
        root = workshop.unpack(
            directory("d"),
            file("f", mode=0o666),
            char("n", 1, 3, mode=0o666),
            file("a/b/c"),
            symlink("link", "/to/what/is/missing"),
            file("link/x"),
        )
    finally:
        os.umask(umask)
    modes = [stat.S_IMODE((root / name).stat().st_mode) for name in ("d", "f", "n", "a/b")]
    assert modes == [0o755, 0o666, 0o666, 0o755]
    implied = [root, *(root / "to/what/is/missing/x").parents[:4]]
    assert {stat.S_IMODE(path.stat().st_mode) for path in implied} == {0o755}


def test_xattrs(workshop: Workshop) -> None:
    capability = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)  # cap_net_bind_service+ep
    text = capability.decode("utf-8", "surrogateescape")
    root = workshop.unpack(
        file("ping", uid=5, xattrs={"security.capability": text, "user.note": "a=b\n"}),
        file("labelled", xattrs={"security.selinux": "system_u:object_r:bin_t:s0"}),
    )
    assert os.getxattr(root / "ping", "security.capability") == capability
    assert os.getxattr(root / "ping", "user.note") == b"a=b\n"
    assert os.listxattr(root / "labelled") == []


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress])
def test_compressions(workshop: Workshop, compress: type[bytes]) -> None:
    tar = archive(file("a", b"x" * 100_000))
    root = workshop.unpack_blob(compress(tar), digest(tar))
    assert (root / "a").stat().st_size == 100_000


def test_a_zstd_blob_may_begin_with_a_frame_to_skip(workshop: Workshop) -> None:
    tar = archive(file("a", b"x" * 5000))
    skipped = b"\x5d\x2a\x4d\x18" + struct.pack("<I", 4) + b"pzst"
    root = workshop.unpack_blob(skipped + zstandard.compress(tar), digest(tar))
    assert names(root) == ["a"]


def test_zeros_after_a_gzip_member_are_padding(workshop: Workshop) -> None:
    tar = archive(file("a", b"x" * 5000))
    root = workshop.unpack_blob(gzip.compress(tar) + bytes(1000), digest(tar))
    assert names(root) == ["a"]


def test_names_that_climb_and_stay_inside(workshop: Workshop) -> None:
    """Some tools write them; what stands before a ".." need not be there, and is not followed."""
    root = workshop.unpack(
        directory("usr/bin/", mode=0o711),
        symlink("elsewhere", "usr/bin"),
        file("usr/bin/../lib/b", b"2"),
        file("none/../a", b"1"),
        file("elsewhere/../c", b"3"),
        link("usr/../d", "./usr/bin/../lib/b"),
        directory("usr/bin/../bin/./", mode=0o700),
        directory("a/.."),
    )
    assert names(root) == ["a", "c", "d", "elsewhere", "usr"]
    assert names(root / "usr") == ["bin", "lib"]
    assert (root / "d").read_bytes() == (root / "usr/lib/b").read_bytes() == b"2"
    assert (root / "c").read_bytes() == b"3"
    assert stat.S_IMODE((root / "usr/bin").stat().st_mode) == 0o700
    root = workshop.unpack(file("x/../usr/lib/.wh.b"))
    assert is_whiteout(os.lstat(root / "usr/lib/b"))


def test_several_gzip_members_are_one_layer(workshop: Workshop) -> None:
    tar = archive(file("a", b"x" * 5000), file("b", b"y"))
    members = b"".join(gzip.compress(tar[at : at + 512]) for at in range(0, len(tar), 512))
    root = workshop.unpack_blob(members, digest(tar))
    assert names(root) == ["a", "b"]


def test_the_diff_id_counts(workshop: Workshop) -> None:
    tar = archive(file("a"))
    with pytest.raises(DataLoss, match="has the digest"):
        workshop.unpack_blob(gzip.compress(tar), digest(b"other"))


@pytest.mark.parametrize(
    "blob", [b"", b"\x1f\x8b\x08", gzip.compress(b"junk" * 200), gzip.compress(b"x" * 5000)[:-9]]
)
def test_damaged_blobs(workshop: Workshop, blob: bytes) -> None:
    with pytest.raises((InvalidArgument, DataLoss)):
        workshop.unpack_blob(blob, digest(b"other"))


def test_later_entries_replace_earlier_ones(workshop: Workshop) -> None:
    root = workshop.unpack(
        file("a", b"old"),
        file("a", b"new"),
        directory("b"),
        file("b/x/y"),
        symlink("b", "c"),
        symlink("d", "nowhere"),
        file("d", b"file"),
        file("e"),
        directory("e"),
        file("e/f"),
        directory("g", mode=0o700),
        file("g/h"),
        directory("g", mode=0o711),
        file("i", b"first"),
        link("j", "i"),
        file("i", b"second"),
        link("a", "i"),
    )
    assert os.readlink(root / "b") == "c"
    assert (root / "d").read_bytes() == b"file"
    assert names(root / "e") == ["f"]
    assert names(root / "g") == ["h"]
    assert stat.S_IMODE((root / "g").stat().st_mode) == 0o711
    assert (root / "j").read_bytes() == b"first"
    assert (root / "a").read_bytes() == b"second"


def test_links_on_the_way_are_followed_inside(workshop: Workshop) -> None:
    root = workshop.unpack(
        directory("usr/lib"),
        symlink("lib", "/usr/lib"),
        file("lib/a", b"a"),
        symlink("opt", "../../usr/new"),
        file("opt/b/c", b"b"),
        link("lib/d", "lib/a"),
    )
    assert (root / "usr/lib/a").read_bytes() == b"a"
    assert (root / "usr/lib/d").read_bytes() == b"a"
    assert (root / "usr/new/b/c").read_bytes() == b"b"
    assert (root / "lib").is_symlink()


BASE: tuple[Member, ...] = (
    directory("keep", mode=0o1777, uid=4, gid=5, mtime=1000),
    file("keep/old", b"old"),
    directory("gone"),
    file("gone/old"),
    directory("anew"),
    file("anew/old"),
    file("file", b"old"),
)


def test_whiteouts(workshop: Workshop) -> None:
    workshop.unpack(*BASE)
    workshop.unpack(
        file("keep/.wh.old"),
        file("keep/new"),
        file(".wh.gone"),
        file("anew/.wh..wh..opq"),
        file("anew/new"),
        file(".wh.file"),
        file(".wh.never-was"),
    )
    with overlay(workshop) as merged:
        assert names(merged) == ["anew", "keep"]
        assert names(merged / "keep") == ["new"]
        assert names(merged / "anew") == ["new"]


@pytest.mark.parametrize("order", [1, -1])
def test_a_whiteout_hides_only_what_is_below(workshop: Workshop, order: int) -> None:
    workshop.unpack(*BASE)
    members = [
        [file(".wh.gone"), file(".wh.file"), file("keep/.wh.old")],
        [directory("gone"), file("file", b"new"), link("keep/old", "anew/old")],
    ]
    workshop.unpack(*(entry for group in members[::order] for entry in group))
    with overlay(workshop) as merged:
        assert names(merged) == ["anew", "file", "gone", "keep"]
        assert names(merged / "gone") == []
        assert (merged / "file").read_bytes() == b"new"
        assert names(merged / "keep") == ["old"]


def test_a_whiteout_and_then_what_is_in_its_place(workshop: Workshop) -> None:
    workshop.unpack(*BASE)
    root = workshop.unpack(
        file(".wh.gone"), file("gone/new/file"), file("keep/.wh.old"), link("keep/old/link", "file")
    )
    with overlay(workshop) as merged:
        assert names(merged / "gone") == ["new"]
        assert names(merged / "keep/old") == ["link"]
    assert stat.S_IMODE((root / "gone").stat().st_mode) == 0o755


def test_what_is_no_whiteout_is_no_directory(workshop: Workshop) -> None:
    with pytest.raises(InvalidArgument, match="Not a directory"):
        workshop.unpack(char("a", 1, 3), file("a/b/c"))


def test_a_directory_in_the_place_of_anything_hides_what_is_below(workshop: Workshop) -> None:
    workshop.unpack(*BASE)
    workshop.unpack(file("gone"), directory("gone"), symlink("keep", "x"), directory("keep"))
    with overlay(workshop) as merged:
        assert names(merged / "gone") + names(merged / "keep") == []


def test_whiteouts_that_hide_nothing_are_not_seen(workshop: Workshop) -> None:
    """A directory that only one layer has is listed as it is there."""
    workshop.unpack(*BASE, file("first/.wh.never-was"), file("gone/dir/below"), file("link/x"))
    root = workshop.unpack(
        directory("new", mtime=1000),
        file("new/.wh.never-was"),
        file("file/.wh.never-was"),
        file("anew/.wh.old"),
        file("anew/.wh..wh..opq"),
        file("gone/.wh.old"),
        file("gone/.wh.dir"),
        file("gone/dir/.wh.below"),
        file("link/.wh.x"),
        symlink("link", "nowhere"),
    )
    with overlay(workshop) as merged:
        for name in ("first", "new", "file", "anew", "gone/dir"):
            assert names(merged / name) == []
        assert names(merged / "gone") == ["dir"]
    assert is_whiteout((root / "gone/old").lstat())
    assert (root / "new").stat().st_mtime == 1000


def test_names_of_aufs_are_left_out(workshop: Workshop) -> None:
    root = workshop.unpack(
        directory(".wh..wh.plnk"), file(".wh..wh.plnk/1.2"), file(".wh..wh.aufs"), file("a")
    )
    assert names(root) == ["a"]


def test_directories_that_are_not_described_are_as_below(workshop: Workshop) -> None:
    workshop.unpack(*BASE, directory("keep/deep", mode=0o700, uid=8))
    workshop.unpack(file("x"))
    root = workshop.unpack(file("keep/deep/new/file"))
    status = (root / "keep").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o1777, 4, 5)
    assert status.st_mtime == 1000
    status = (root / "keep/deep").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o700, 8)
    assert stat.S_IMODE((root / "keep/deep/new").stat().st_mode) == 0o755


def test_what_is_hidden_is_not_inherited(workshop: Workshop) -> None:
    workshop.unpack(*BASE)
    workshop.unpack(file(".wh.keep"))
    root = workshop.unpack(file("keep/new"))
    status = (root / "keep").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o755, 0)


def test_hard_links_to_layers_below_are_copies(workshop: Workshop) -> None:
    workshop.unpack(
        directory("d", mtime=1000),
        file("d/a", b"content", mode=0o4711, uid=3, mtime=2000, xattrs={"user.x": "y"}),
        symlink("d/s", "a"),
        member("d/p", tarfile.FIFOTYPE, mode=0o4711, uid=3),
    )
    root = workshop.unpack(
        directory("d", mtime=1000),
        link("d/b", "d/a"),
        link("d/t", "d/s"),
        link("d/c", "d/b"),
        link("d/q", "d/p"),
    )
    status = (root / "d/b").stat()
    assert (root / "d/b").read_bytes() == b"content"
    assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o4711, 3)
    assert status.st_mtime == 2000
    assert os.getxattr(root / "d/b", "user.x") == b"y"
    assert os.readlink(root / "d/t") == "a"
    status = (root / "d/q").stat()
    assert (status.st_mode, status.st_uid) == (stat.S_IFIFO | 0o4711, 3)
    assert (root / "d").stat().st_mtime == 1000


@pytest.mark.parametrize("target", ["d/none", "d/gone", "d", "hidden/a"])
def test_hard_links_to_nothing(workshop: Workshop, target: str) -> None:
    workshop.unpack(file("d/gone"), file("hidden/a"))
    workshop.unpack(file("d/.wh.gone"), file("hidden/.wh..wh..opq"))
    with pytest.raises(InvalidArgument, match='layer entry "b"'):
        workshop.unpack(link("b", target))


def test_many_directories_get_their_times(workshop: Workshop) -> None:
    count = 200
    root = workshop.unpack(
        *(directory(f"d{n}", mtime=1000 + n) for n in range(count)),
        *(file(f"d{n}/f") for n in range(count)),
    )
    assert [(root / f"d{n}").stat().st_mtime for n in range(count)] == [
        1000 + n for n in range(count)
    ]


def test_an_opaque_root_hides_everything_below(workshop: Workshop) -> None:
    workshop.unpack(*BASE)
    workshop.unpack(file(".wh..wh..opq"), file("new"))
    workshop.unpack(file("newer"))
    with overlay(workshop) as merged:
        assert names(merged) == ["new", "newer"]
