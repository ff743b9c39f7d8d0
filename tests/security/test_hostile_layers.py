"""Layers made to get out of their directory, to outlive it, or to fill the node. Nothing of the host may change."""

from __future__ import annotations

import gzip
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from nodeagent import disk_reserve, files
from nodeagent.errors import InvalidArgument, ResourceExhausted, Unsupported
from nodeagent.images import budget
from nodeagent.images.layer_store import LayerStore
from nodeagent.images.unpack import directories, layers, whiteouts
from nodeagent.store import Store
from nodeagent.tasks import Tasks
from nodeagent.trash import Trash
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

UP = "../" * 12


class Host:
    """Files of the node beside the layer, which every test finds as they were."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.secret = folder / "secret"
        self.secret.write_text("the host's")
        self.secret.chmod(0o600)
        (folder / "directory").mkdir()
        self.before = self.state()

    def state(self) -> list[tuple[str, os.stat_result | tuple[int, ...]]]:
        """Names, modes, owners, links and times of everything below."""
        found = []
        for path in sorted([self.folder, *self.folder.rglob("*")]):
            status = path.lstat()
            times = () if path == self.folder else (status.st_mtime_ns,)
            found.append(
                (
                    str(path),
                    (status.st_mode, status.st_uid, status.st_nlink, status.st_size, *times),
                )
            )
        return found


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    folder = tmp_path / "host"
    folder.mkdir()
    made = Host(folder)
    yield made
    assert made.state() == made.before


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    folder = tmp_path / "layers"
    folder.mkdir()
    return Workshop(folder, max_entries=2_000)


def content(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


# --- names ---


@pytest.mark.parametrize(
    "name",
    [
        "..",
        "../host/secret",
        UP + "etc/nodeagent-test",
        "a/../../host/secret",
        "/../host/secret",
        "./../host/secret",
        "x" * 256,
        "x/" * 3000 + "y",
    ],
)
@pytest.mark.parametrize("make", [file, directory, lambda name: symlink(name, "x")])
def test_names_that_lead_out(host: Host, workshop: Workshop, name: str, make: object) -> None:
    with pytest.raises(InvalidArgument, match="layer entry"):
        workshop.unpack(directory("a"), make(name))  # type: ignore[operator]


@pytest.mark.parametrize("make", [file, lambda name: symlink(name, "x")])
def test_nothing_but_a_directory_is_the_root(workshop: Workshop, make: object) -> None:
    with pytest.raises(InvalidArgument, match="as the root"):
        workshop.unpack(directory("a"), make("a/.."))  # type: ignore[operator]


def test_names_that_can_not_be_printed(workshop: Workshop) -> None:
    """They are names of files, but no text: an error about them must not be one itself."""
    name = b"\xff\xfe/..".decode("utf-8", "surrogateescape")
    with pytest.raises(InvalidArgument) as caught:
        workshop.unpack(file(name))
    assert str(caught.value).encode()
    with pytest.raises(InvalidArgument) as caught:
        workshop.unpack(link("\udcff", "\udcfe"))
    assert str(caught.value).encode()
    root = workshop.unpack(file("\udcff"))
    assert os.listdir(os.fsencode(root)) == [b"\xff"]


def test_absolute_names_are_names_in_the_layer(host: Host, workshop: Workshop) -> None:
    root = workshop.unpack(file(str(host.secret), b"layer's"), file("//etc//nodeagent-test"))
    assert (root / str(host.secret).strip("/")).read_text() == "layer's"
    assert not Path("/etc/nodeagent-test").exists()


def test_files_through_links_that_lead_out(host: Host, workshop: Workshop) -> None:
    inside = str(host.folder).strip("/")
    root = workshop.unpack(
        symlink("absolute", str(host.folder)),
        file("absolute/secret", b"absolute"),
        symlink("relative", UP + inside),
        file("relative/other", b"relative"),
        symlink("twice", "relative"),
        directory("twice/directory", mode=0o777, uid=1000),
        link("twice/linked", "twice/secret"),
        file("twice/.wh.gone"),
        file("twice/.wh..wh..opq"),
    )
    assert (root / inside / "secret").read_bytes() == b"absolute"
    assert content(root / inside) == {"secret", "other", "directory", "linked", "gone"}


def test_links_of_procfs(host: Host, workshop: Workshop) -> None:
    with pytest.raises(InvalidArgument):
        workshop.unpack(
            symlink("a", "/proc/self/fd/0"), file("a/x"), symlink("b", "b"), file("b/x")
        )


@pytest.mark.parametrize("target", ["loop", "./loop", "/loop", "other"])
def test_links_in_circles(workshop: Workshop, target: str) -> None:
    with pytest.raises(InvalidArgument, match="layer entry"):
        workshop.unpack(symlink("loop", target), symlink("other", "loop"), file("loop/x"))


def test_a_file_in_the_place_of_a_link(host: Host, workshop: Workshop) -> None:
    """The last component is replaced, never followed."""
    root = workshop.unpack(
        symlink("a", str(host.secret)),
        file("a", b"new", mode=0o777, uid=1000),
        symlink("b", str(host.folder)),
        directory("b", mode=0o777, uid=1000),
        file("b/secret", b"new"),
        symlink("c", str(host.secret)),
        char("c", 1, 3),
        symlink("d", str(host.secret), uid=1000, mtime=5),
    )
    assert (root / "a").read_bytes() == b"new"
    assert (root / "b/secret").read_bytes() == b"new"


def test_a_directory_replaced_by_a_link_while_it_is_in_use(host: Host, workshop: Workshop) -> None:
    root = workshop.unpack(
        directory("a"),
        file("a/one"),
        symlink("a", str(host.folder)),
        file("a/secret", b"two"),
        directory("a/directory", mode=0o777),
        symlink("a", str(host.folder / "directory")),
        file("a/three"),
    )
    assert content(root / str(host.folder).strip("/")) == {
        "secret",
        "directory",
        "directory/three",
    }


def test_a_directory_that_ends_in_a_circle(workshop: Workshop) -> None:
    """Its time is to be set, its attributes to be inherited, a link to be put into it, when it is gone."""
    workshop.unpack(directory("a/b/c"), file("target"))
    root = workshop.unpack(
        directory("a"),
        directory("a/b"),
        file("a/b/c/d/file"),
        link("a/b/late", "target"),
        symlink("a", "a"),
    )
    assert content(root) == {"a"}


def test_removal_of_what_is_replaced_follows_no_link(host: Host, workshop: Workshop) -> None:
    root = workshop.unpack(
        directory("d"),
        symlink("d/out", str(host.folder)),
        symlink("d/file", str(host.secret)),
        file("d", b""),
    )
    assert content(root) == {"d"}


# --- hard links ---


@pytest.mark.parametrize("target", [UP + "etc/passwd", "../host/secret", "..", ".", "/", ""])
def test_hard_links_that_lead_out(host: Host, workshop: Workshop, target: str) -> None:
    with pytest.raises(InvalidArgument, match="layer entry"):
        workshop.unpack(link("a", target))


@pytest.mark.parametrize("target", ["/etc/passwd", "out/secret", "direct"])
def test_hard_links_to_the_host(host: Host, workshop: Workshop, target: str) -> None:
    """A target is looked for in the image only; a link to it is linked itself."""
    members = (symlink("out", str(host.folder)), symlink("direct", str(host.secret)))
    if target == "direct":
        root = workshop.unpack(*members, link("a", target))
        assert (root / "a").is_symlink()
        return
    with pytest.raises(InvalidArgument, match="layer entry"):
        workshop.unpack(*members, link("a", target))


def test_hard_links_through_links_of_lower_layers(host: Host, workshop: Workshop) -> None:
    workshop.unpack(symlink("out", str(host.folder)), symlink("direct", str(host.secret)))
    with pytest.raises(InvalidArgument, match="layer entry"):
        workshop.unpack(link("a", "out/secret"))
    root = Workshop(workshop.folder / "again")
    root.folder.mkdir()
    root.unpack(symlink("direct", str(host.secret)))
    copied = root.unpack(link("a", "direct"))
    assert (copied / "a").is_symlink()


def test_writing_through_a_hard_link(workshop: Workshop) -> None:
    """A lower layer's file that a layer links to and writes again is not the same file any more."""
    lower = workshop.unpack(file("a", b"old"))
    upper = workshop.unpack(link("b", "a"), file("b", b"new"))
    assert (lower / "a").read_bytes() == b"old"
    assert (upper / "b").read_bytes() == b"new"


def test_directories_inherit_through_no_link(host: Host, workshop: Workshop) -> None:
    """What a directory is like is not learned from the host."""
    host.folder.joinpath("directory").chmod(0o755)
    workshop.unpack(symlink("d", str(host.folder)))
    root = workshop.unpack(file("d/directory/x"))
    assert not (root / "d").is_symlink()


# --- whiteouts ---


@pytest.mark.parametrize(
    "name",
    [".wh.", ".wh..", ".wh...", "a/.wh.", "a/.wh..", "a/.wh...", ".wh.../x", ".wh.a/b", ".wh./a"],
)
def test_whiteout_tricks(host: Host, workshop: Workshop, name: str) -> None:
    with pytest.raises(InvalidArgument, match="layer entry"):
        workshop.unpack(directory("a"), file(name))


def test_a_whiteout_is_no_way_to_the_host(host: Host, workshop: Workshop) -> None:
    root = workshop.unpack(
        symlink("out", str(host.folder)), file("out/.wh.secret"), file("out/.wh..wh..opq")
    )
    assert content(root / str(host.folder).strip("/")) == {"secret"}


def test_whiteouts_of_every_type(workshop: Workshop) -> None:
    workshop.unpack(file("a"), file("b"), file("c"))
    root = workshop.unpack(directory(".wh.a"), symlink(".wh.b", "/etc"), link(".wh.c", "none"))
    for name in "abc":
        assert whiteouts.is_whiteout((root / name).lstat())


# --- attributes and types ---


@pytest.mark.parametrize(
    "name",
    [
        "trusted.overlay.opaque",
        "trusted.overlay.redirect",
        "trusted.overlay.metacopy",
        "user.overlay.redirect",
    ],
)
def test_attributes_that_overlay_would_obey(workshop: Workshop, name: str) -> None:
    with pytest.raises(InvalidArgument, match=name):
        workshop.unpack(directory("a", xattrs={name: "/etc"}))


def test_other_attributes_of_the_host_are_left_out(workshop: Workshop) -> None:
    names = ("trusted.x", "security.ima", "security.evm", "system.nonsense", "nonsense")
    root = workshop.unpack(file("a", xattrs=dict.fromkeys(names, "x")))
    assert os.listxattr(root / "a") == []


@pytest.mark.parametrize("owner", [2**32 - 1, -1, 2**32])
def test_owners_that_mean_something_else(workshop: Workshop, owner: int) -> None:
    """To chown(2), the highest number means: leave it to whoever runs this."""
    with pytest.raises(InvalidArgument, match="tar: uid"):
        workshop.unpack(file("a", pax_headers={"uid": str(owner)}))


@pytest.mark.parametrize("kind", [b"D", b"M", b"s"])
def test_unknown_types(workshop: Workshop, kind: bytes) -> None:
    with pytest.raises(Unsupported, match="tar: "):
        workshop.unpack(member("a", kind))


def test_a_hole_takes_no_disk(workshop: Workshop) -> None:
    sparse = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(1 << 40)}
    root = workshop.unpack(file("a", b"x", pax_headers=sparse))
    status = (root / "a").stat()
    assert (status.st_size, status.st_blocks <= 16) == (1 << 40, True)


def test_a_hole_that_no_file_can_have(workshop: Workshop) -> None:
    sparse = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(1 << 50)}
    with pytest.raises(InvalidArgument, match=r"Invalid argument|File too large"):
        workshop.unpack(file("a", b"x", pax_headers=sparse))


def sparse(name: str, regions: list[tuple[int, bytes]], size: int) -> Member:
    """A file of this size that has data only at these offsets."""
    numbers = ",".join(f"{offset},{len(data)}" for offset, data in regions)
    headers = {"GNU.sparse.map": numbers, "GNU.sparse.size": str(size)}
    return file(name, b"".join(data for _, data in regions), pax_headers=headers)


@pytest.mark.parametrize(
    "regions",
    [
        [],
        [(0, b"first")],
        [(1 << 39, b"middle")],
        [(4096, b"x" * 70_000), ((1 << 40) - 4, b"last")],
    ],
)
def test_a_sparse_file_linked_to_from_a_layer_above(
    workshop: Workshop, regions: list[tuple[int, bytes]]
) -> None:
    """A terabyte of zeros is no data, neither in a layer nor in the copy that a layer above it needs."""
    lower = workshop.unpack(sparse("a", regions, 1 << 40))
    upper = workshop.unpack(link("b", "a"))
    status = (upper / "b").stat()
    assert status.st_size == 1 << 40
    assert status.st_blocks == (lower / "a").stat().st_blocks
    with (upper / "b").open("rb") as copied:
        for offset, data in regions:
            copied.seek(offset)
            assert copied.read(len(data)) == data
            assert copied.read(1) in (b"\0", b"")


def test_one_file_below_is_copied_once(workshop: Workshop) -> None:
    """However many names a layer gives it."""
    workshop.unpack(file("a", b"content"), file("other"))
    names = [f"d{number}/b" for number in range(50)]
    root = workshop.unpack(*(link(name, "a") for name in names), link("o", "other"))
    assert len({(root / name).stat().st_ino for name in names}) == 1
    assert (root / names[0]).stat().st_nlink == 50
    assert (root / names[-1]).read_bytes() == b"content"
    assert (root / "o").stat().st_nlink == 1


def test_copies_of_a_bomb(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that compresses well is copied by layers of a few bytes."""
    monkeypatch.setattr(budget, "BOMB_BYTES", 4 << 20)
    workshop.unpack(file("a", bytes(3 << 20)))
    workshop.unpack(link("b", "a"))
    workshop.unpack(file("c", b"c" * (3 << 20)))
    with pytest.raises(ResourceExhausted, match="copy more than"):
        workshop.unpack(link("d", "a"), link("e", "c"))


def test_a_byte_in_each_of_many_regions(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes a block of the disk for each byte of the archive."""
    monkeypatch.setattr(budget, "BOMB_BYTES", 1 << 20)
    regions = [(number << 20, b"x") for number in range(2_000)]
    with pytest.raises(ResourceExhausted, match="more than 1048576 bytes"):
        workshop.unpack(sparse("a", regions, 2_000 << 20))
    assert (workshop.folder / "layer-0/a").stat().st_blocks * 512 <= 2 << 20


async def test_only_root_gets_at_the_layers(tmp_path: Path) -> None:
    """CVE-2021-41103: set-id programs and device nodes of images are within the reach of no user of the node."""
    staging = Trash(tmp_path / "staging", "staging", Tasks())
    store = Store.open(tmp_path / "state.db")
    LayerStore(tmp_path / "layers", staging, store)
    await staging.close()
    store.close()
    for name in ("staging", "layers"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o700


# --- sizes ---


def test_too_many_entries(workshop: Workshop) -> None:
    with pytest.raises(ResourceExhausted, match="2000 files"):
        workshop.unpack(*(file(f"{number}") for number in range(2_001)))


def test_too_many_directories_on_the_way(workshop: Workshop) -> None:
    paths = ("/".join(f"{number}-{depth}" for depth in range(300)) for number in range(10))
    with pytest.raises(ResourceExhausted, match="2000 files"):
        workshop.unpack(*(file(path) for path in paths))


def test_one_name_again_and_again(tmp_path: Path) -> None:
    """Entries of the cheapest kind: the blob is small, and so is what is left of it."""
    header = archive(file("a"))[:512]
    blob = gzip.compress(header * 200_000, 1)
    with pytest.raises(ResourceExhausted, match="20000 files"):
        Workshop(tmp_path, max_entries=20_000).unpack_blob(blob, digest(b""))


def test_paths_are_not_remembered_without_a_bound(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_MAX_POSTPONED_BYTES", 20_000)
    monkeypatch.setattr(directories, "_MAX_REMEMBERED_BYTES", 20_000)
    members: list[Member] = [directory(f"{number:0200}") for number in range(300)]
    assert len(content(workshop.unpack(*members))) == 300
    with pytest.raises(ResourceExhausted, match="rest on layers below"):
        workshop.unpack(*(link(f"{number:0200}", "a") for number in range(300)))


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_bombs(workshop: Workshop, compress: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "BOMB_BYTES", 1 << 20)
    tar = archive(file("zeros", bytes(64 << 20)))
    with pytest.raises(ResourceExhausted, match="unpack to more than"):
        workshop.unpack_blob(compress(tar), digest(tar))  # type: ignore[operator]
    assert (workshop.folder / "layer-0/zeros").stat().st_size < 64 << 20


def test_an_image_larger_than_allowed(tmp_path: Path) -> None:
    with pytest.raises(ResourceExhausted, match="more than 1000000 bytes"):
        Workshop(tmp_path, max_bytes=1_000_000).unpack(file("a", os.urandom(1_200_000)))


def test_a_size_that_is_not_there(workshop: Workshop) -> None:
    """A header may announce a petabyte: nothing is reserved for it."""
    info = tarfile.TarInfo("a")
    info.size = 1 << 49
    tar = info.tobuf(tarfile.GNU_FORMAT) + b"x" * 1024
    with pytest.raises(InvalidArgument, match="cut off"):
        workshop.unpack_blob(gzip.compress(tar), digest(tar))


def test_a_window_larger_than_memory(workshop: Workshop) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=29, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    tar = archive(file("a", os.urandom(1 << 20)))
    with pytest.raises(InvalidArgument, match="zstd data that needs a window"):
        workshop.unpack_blob(compressor.compress(tar) + compressor.flush(), digest(tar))


def test_a_large_window_of_a_bad_layer_is_given_back(workshop: Workshop) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True)
    for name in ("../bad", "good"):
        compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        tar = archive(file("first", bytes(1 << 20)), file(name, os.urandom(1 << 20)))
        blob = compressor.compress(tar) + compressor.flush()
        if name == "good":
            workshop.unpack_blob(blob, digest(tar))
            continue
        with pytest.raises(InvalidArgument, match=r"\.\.") as kept:
            workshop.unpack_blob(blob, digest(tar))
    assert kept.value.__traceback__  # as it is while the error is on its way to the caller


def test_the_disk_keeps_a_reserve(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_reserve, "_RESERVE_BYTES", 1 << 60)
    monkeypatch.setattr(disk_reserve, "_RESERVE_SHARE", 1)
    with pytest.raises(ResourceExhausted, match="left on the disk"):
        workshop.unpack(file("a"))


def test_the_disk_keeps_inodes(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_reserve, "_RESERVE_INODES", 1 << 60)
    monkeypatch.setattr(disk_reserve, "_RESERVE_SHARE", 1)
    monkeypatch.setattr(disk_reserve, "_RESERVE_BYTES", 0)
    with pytest.raises(ResourceExhausted, match="inodes left on the disk"):
        workshop.unpack(file("a"))


def test_directories_on_the_way_take_disk(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name of 4096 bytes is 2000 blocks: the disk is looked at for these as for bytes."""
    looks: list[int] = []
    monkeypatch.setattr(disk_reserve, "require_space", lambda _, size: looks.append(size))
    workshop.unpack(file("d/" * 1_900 + "x"))
    assert len(looks) >= 3


def test_deep_trees(workshop: Workshop) -> None:
    path = "/".join(["d"] * 1900)
    root = workshop.unpack(*(file(f"{path}/{number}") for number in range(50)))
    files.remove_tree(str(root))
    assert not root.exists()
