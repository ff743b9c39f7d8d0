"""The tar reader against Python's own writer, and against damage."""

import io
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.errors import InvalidArgument, NodeAgentError, Unsupported
from nodeagent.images.unpack import tar

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
KINDS = {
    tarfile.REGTYPE: "file",
    tarfile.DIRTYPE: "directory",
    tarfile.SYMTYPE: "symlink",
    tarfile.LNKTYPE: "link",
    tarfile.CHRTYPE: "char",
    tarfile.BLKTYPE: "block",
    tarfile.FIFOTYPE: "fifo",
}


def info(name: str, kind: bytes = tarfile.REGTYPE, **fields: Any) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type = kind
    for field, value in fields.items():
        setattr(made, field, value)
    return made


def archive(
    *members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT, end: bool = True
) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=form) as writer:
        for member, data in members:
            member.size = len(data)
            writer.addfile(member, io.BytesIO(data))
        if not end:
            return raw.getvalue()
    return raw.getvalue()


def block(**fields: bytes) -> bytes:
    """One header block made by hand, with a right checksum."""
    values = {"name": b"a", "mode": b"0644", "type": b"0", "magic": b"ustar\0", "version": b"00"}
    values |= {"checksum": b" " * 8} | fields
    packed = tar._HEADER.pack(*(values.get(name, b"") for name in tar._Raw._fields))
    return packed[:148] + b"%06o\0 " % sum(packed) + packed[156:]


def read(data: bytes, *sizes: int) -> list[tuple[tar.Entry, bytes]]:
    return [
        (entry, b"".join(bytes(p.size) if isinstance(p, tar.Hole) else p for p in pieces))
        for entry, pieces in tar.read(split(data, *sizes))
    ]


def split(data: bytes, *sizes: int) -> Iterator[bytes]:
    at, turn = 0, 0
    while at < len(data):
        step = sizes[turn % len(sizes)] if sizes else len(data)
        yield data[at : at + step]
        at, turn = at + step, turn + 1


@pytest.mark.parametrize("form", FORMATS)
def test_every_kind(form: int) -> None:
    members = [
        info("dir/", tarfile.DIRTYPE, mode=0o1777, uid=5, gid=6),
        info("dir/file", mode=0o4755, mtime=1700000000),
        info("dir/symlink", tarfile.SYMTYPE, linkname="../x"),
        info("dir/link", tarfile.LNKTYPE, linkname="dir/file"),
        info("null", tarfile.CHRTYPE, devmajor=1, devminor=3),
        info("sda", tarfile.BLKTYPE, devmajor=8, devminor=0),
        info("pipe", tarfile.FIFOTYPE),
    ]
    data = archive(*((member, b"xy" if member.isreg() else b"") for member in members), form=form)
    got = read(data)
    assert [entry.kind for entry, _ in got] == [KINDS[member.type] for member in members]
    assert [entry.name.rstrip("/") for entry, _ in got] == [m.name.rstrip("/") for m in members]
    assert (got[0][0].mode, got[0][0].uid, got[0][0].gid) == (0o1777, 5, 6)
    assert (got[1][0].mode, got[1][0].mtime_ns, got[1][1]) == (0o4755, 1700000000 * 10**9, b"xy")
    assert (got[2][0].target, got[3][0].target) == ("../x", "dir/file")
    assert (got[4][0].device, got[5][0].device) == ((1, 3), (8, 0))


@pytest.mark.parametrize("form", FORMATS)
def test_empty_archive(form: int) -> None:
    assert read(archive(form=form)) == []
    assert read(b"") == []


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_odd_names(form: int) -> None:
    names = ["d/" * 100 + "file", "ä" * 100, "new\nline", "raw\udcff\udcfe", "x" * 300, " "]
    members = [info(name, tarfile.SYMTYPE, linkname=name) for name in names]
    got = read(archive(*((member, b"") for member in members), form=form))
    assert [entry.name for entry, _ in got] == names
    assert [entry.target for entry, _ in got] == names


def test_ustar_prefix() -> None:
    name = "p" * 120 + "/" + "n" * 90
    ((entry, _),) = read(archive((info(name), b""), form=tarfile.USTAR_FORMAT))
    assert entry.name == name


def test_the_prefix_is_of_posix_only() -> None:
    ((entry, _),) = read(block(magic=b"ustar ", version=b" \0", prefix=b"12345"))
    assert entry.name == "a"


def test_numbers() -> None:
    pax = info("p", uid=3_000_000, gid=2**32 - 2, mtime=1700000000.25)
    ((entry, _),) = read(archive((pax, b"")))
    assert (entry.uid, entry.gid, entry.mtime_ns) == (3_000_000, 2**32 - 2, 1700000000_250000000)
    gnu = info("p", uid=3_000_000, gid=2**32 - 2, mtime=-5)
    ((entry, _),) = read(archive((gnu, b""), form=tarfile.GNU_FORMAT))
    assert (entry.uid, entry.gid, entry.mtime_ns) == (3_000_000, 2**32 - 2, 0)


def test_a_size_beyond_octal() -> None:
    header = block(size=b"\x80" + (1 << 40).to_bytes(11, "big"))
    entry, _ = next(tar.read(iter([header])))
    assert entry.size == 1 << 40


def test_xattrs() -> None:
    headers = {"SCHILY.xattr.user.a": "1\n=2", "SCHILY.xattr.security.capability": "\1\0\udcff"}
    ((entry, _),) = read(archive((info("a", pax_headers=headers), b"")))
    assert entry.xattrs == {"user.a": b"1\n=2", "security.capability": b"\x01\x00\xff"}


def test_old_directories() -> None:
    ((entry, _),) = read(block(name=b"d/", type=b"\0", magic=b""))
    assert entry.kind == "directory"


def test_what_the_reader_leaves_is_skipped() -> None:
    data = archive((info("a"), b"x" * 5000), (info("b"), b"y"))
    names = []
    for entry, pieces in tar.read(split(data, 700)):
        names.append(entry.name)
        next(pieces)
    assert names == ["a", "b"]


def test_bytes_after_the_end_stay() -> None:
    chunks = iter([archive((info("a"), b"x")), b"rest"])
    assert [entry.name for entry, _ in tar.read(chunks)] == ["a"]
    assert list(chunks) == [b"rest"]


@pytest.mark.parametrize(
    "data",
    [
        block()[:-1],
        block(size=b"5") + b"abc",
        block(size=b"12345678"),
        block(size=b"1_0"),
        block(size=b"-5"),
        block(size=b"\xff" * 12),
        block(size=b"\x80" + b"\x7f" * 11),
        block(uid=b"zz"),
        block(uid=b"\x80\0\0\0\xff\xff\xff\xff"),
        block(type=b"3", major=b"\x80\0\0\0\0\xff\xff\xff"),
        block(type=b"L", size=b"77777777777"),
        block(type=b"x", size=b"3") + b"0 a".ljust(512, b"\0"),
        block(type=b"x", size=b"4") + b"4 =\n".ljust(512, b"\0") + block(),
        block(type=b"x", size=b"5") + b"9 a=b".ljust(512, b"\0"),
        block(type=b"x", size=b"6") + b"6 a=b\n".ljust(512, b"\0"),
        block(type=b"g") * 20 + block(),
        block()[:100] + b"1" + block()[101:],
        bytes(512) + block(),
        b"\1" * 512,
    ],
)
def test_malformed(data: bytes) -> None:
    with pytest.raises(InvalidArgument, match=r"^tar: "):
        read(data)


@pytest.mark.parametrize(
    ("key", "value"),
    [("path", "a\0b"), ("linkpath", "\0"), ("uid", "-1"), ("gid", "4294967295"), ("mtime", "now")],
)
def test_malformed_records(key: str, value: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^tar: "):
        read(archive((info("a", pax_headers={key: value}), b"")))


def test_unknown_types_and_versions_are_unsupported() -> None:
    sparse = archive((info("a", pax_headers={"GNU.sparse.major": "2"}), b""))
    for data in (block(type=b"D"), block(type=b"M"), sparse):
        with pytest.raises(Unsupported, match=r"^tar: "):
            read(data)


# --- sparse files ---

SPARSE_FORMATS = {
    "old": ["--format=gnu"],
    "0.0": ["--format=posix", "--sparse-version=0.0"],
    "0.1": ["--format=posix", "--sparse-version=0.1"],
    "1.0": ["--format=posix", "--sparse-version=1.0"],
}
KIB = 1 << 10
SPARSE = {  # where there is data, and the size
    "holes around": ([64 * KIB, 256 * KIB], 512 * KIB),
    "data first": ([0], 256 * KIB),
    "data last": ([252 * KIB], 256 * KIB),
    "more than a header has": ([n * 64 * KIB for n in range(7)], 512 * KIB),
    "more than two blocks have": ([n * 64 * KIB for n in range(60)], 4096 * KIB),
    "nothing": ([], 1024 * KIB),
}


@pytest.mark.parametrize("step", [0, 1000])
@pytest.mark.parametrize("form", SPARSE_FORMATS)
@pytest.mark.parametrize("layout", SPARSE)
def test_sparse_files(tmp_path: Path, layout: str, form: str, step: int) -> None:
    offsets, size = SPARSE[layout]
    name = f"{'long' * 30}/sparse"
    path = tmp_path / name
    path.parent.mkdir()
    with path.open("wb") as file:
        for offset in offsets:
            file.seek(offset)
            file.write(b"%4d" % (offset // KIB) * KIB)
        file.truncate(size)
    (tmp_path / "after").write_text("the next one")
    command = ["tar", "--sparse", *SPARSE_FORMATS[form], "-cf", "-", name, "after"]
    made = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True).stdout
    assert len(made) < size
    [(entry, content), (after, text)] = read(made, *([step] if step else []))
    assert (entry.name, entry.kind, entry.size) == (name, "file", size)
    assert content == path.read_bytes()
    assert (after.name, text) == ("after", b"the next one")


def test_what_is_not_read_of_a_sparse_file_is_passed_over() -> None:
    """A hole may be larger than anybody would read."""
    header = {"GNU.sparse.map": "0,5", "GNU.sparse.size": str(tar.MAX_SIZE)}
    made = archive((info("a", pax_headers=header), b"begin"), (info("b"), b"next"))
    assert [entry.name for entry, _ in tar.read(split(made))] == ["a", "b"]
    [pieces, _] = [list(pieces) for _, pieces in tar.read(split(made))]
    assert pieces == [b"begin", tar.Hole(tar.MAX_SIZE - 5)]


@pytest.mark.parametrize(
    ("records", "content"),
    [
        ({"map": "0,2,1,3", "size": "9"}, b"12345"),  # overlap
        ({"map": "2,5,0,0", "size": "9"}, b"12345"),  # not in order
        ({"map": "0,5", "size": "4"}, b"12345"),  # longer than the file
        ({"map": "0,4", "size": "9"}, b"12345"),  # not all of what is stored
        ({"map": "0", "size": "9"}, b"12345"),
        ({"map": "0,x", "size": "9"}, b"12345"),
        ({"map": "0,-5", "size": "9"}, b"12345"),
        ({"map": "0,5", "size": ""}, b"12345"),
        ({"map": "0,5"}, b"12345"),
        ({"map": "0,5", "size": str(tar.MAX_SIZE + 1)}, b"12345"),
        ({"map": ",".join(["0,0"] * (tar.MAX_REGIONS + 1)), "size": "5"}, b""),
        ({"major": "1", "minor": "0", "realsize": "9"}, b"9" * 2000),
        ({"major": "1", "minor": "0", "realsize": "9"}, b"1\n0\n".ljust(512, b"\0")),
        ({"major": "1", "minor": "0", "realsize": "9"}, b"1000000\n" + b"0\n" * 2000000),
    ],
)
def test_malformed_sparse_files(records: dict[str, str], content: bytes) -> None:
    headers = {f"GNU.sparse.{key}": value for key, value in records.items()}
    with pytest.raises(InvalidArgument, match=r"^tar: "):
        read(archive((info("a", pax_headers=headers), content)))


def test_malformed_sparse_files_of_old() -> None:
    def sparse(*fields: int, more: bytes = b"\0", size: int = 9) -> bytes:
        numbers = b"".join(b"%011o\0" % field for field in fields).ljust(96, b"\0")
        prefix = bytes(41) + numbers + more + b"%011o\0" % size
        return block(type=b"S", size=b"%011o\0" % 5, magic=b"ustar ", prefix=prefix)

    whole = sparse(2, 5) + b"12345".ljust(512, b"\0")
    assert [content for _, content in read(whole)] == [b"\0\0" + b"12345" + b"\0\0"]
    for header in (sparse(0, 4), sparse(5, 5), sparse(2, 2, 0, 3), sparse(more=b"\1"), sparse()):
        with pytest.raises(InvalidArgument, match=r"^tar: "):
            read(header + b"12345".ljust(512, b"\0"))


NAMES = st.text(st.characters(exclude_characters="\0/", codec="utf-8"), min_size=1, max_size=150)
MEMBERS = st.lists(
    st.tuples(
        NAMES, st.sampled_from(sorted(KINDS)), st.integers(0, 2**32 - 2), st.binary(max_size=1500)
    ),
    max_size=5,
)


@given(
    MEMBERS, st.sampled_from(FORMATS[1:]), st.lists(st.integers(1, 2000), min_size=1, max_size=4)
)
def test_any_members_in_any_chunks(members: list[Any], form: int, sizes: list[int]) -> None:
    made = [
        (info(name, kind, uid=uid, linkname=name), data if kind == tarfile.REGTYPE else b"")
        for name, kind, uid, data in members
    ]
    got = read(archive(*made, form=form), *sizes)
    expected = [(m.name.rstrip("/"), KINDS[m.type], m.uid, data) for m, data in made]
    assert [(e.name.rstrip("/"), e.kind, e.uid, data) for e, data in got] == expected


SAMPLE = archive(
    (info("dir", tarfile.DIRTYPE), b""),
    (info("x" * 200, uid=2**31, mtime=1.5), b"data" * 300),
    (info("link", tarfile.SYMTYPE, linkname="y" * 150), b""),
)


@given(st.lists(st.tuples(st.integers(0, len(SAMPLE) - 1), st.integers(0, 255)), max_size=6))
def test_any_damage_is_read_or_refused(changes: list[tuple[int, int]]) -> None:
    data = bytearray(SAMPLE)
    for at, value in changes:
        data[at] = value
    try:
        read(bytes(data), 512)
    except NodeAgentError:
        pass


@given(st.binary(max_size=512), st.sampled_from([b"x", b"L", b"g"]))
def test_any_extended_header_is_read_or_refused(body: bytes, kind: bytes) -> None:
    header = block(type=kind, size=b"%o" % len(body))
    try:
        read(header + body.ljust(512, b"\0") + block())
    except NodeAgentError:
        pass
