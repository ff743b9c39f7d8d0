"""A parser of tar archives: V7, ustar, pax (POSIX.1-2017, "pax Interchange Format") and GNU.

It is pure: chunks of bytes in, of any length, entries out; nothing is opened or written. It refuses what it cannot read
faithfully (unknown types) and whatever is malformed, by `InvalidArgument` or `Unsupported`. Names and targets are not
checked here. Sparse files come in each of the four ways of GNU tar (its manual, "Sparse Formats").
"""

import re
import struct
from collections.abc import Iterator
from typing import Literal, NamedTuple, NoReturn

import msgspec

from nodeagent.errors import InvalidArgument, Unsupported
from nodeagent.linux.userns import MAX_ID

BLOCK = 512
MAX_METADATA_BYTES = 1 << 20
MAX_METADATA_HEADERS = 16  # before one entry
MAX_SIZE = 1 << 50
MAX_SECONDS = 1 << 33
MAX_REGIONS = 1 << 17  # of a sparse file, where it has data

Kind = Literal["file", "directory", "symlink", "link", "char", "block", "fifo"]

_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s6s2s32s32s8s8s155s12x")
_KINDS: dict[bytes, Kind] = {
    b"\0": "file",
    b"0": "file",
    b"1": "link",
    b"2": "symlink",
    b"3": "char",
    b"4": "block",
    b"5": "directory",
    b"6": "fifo",
    b"7": "file",
    b"S": "file",
}
_XATTR = b"SCHILY.xattr."
_SPARSE = b"GNU.sparse."
_SPARSE_MAP = b"GNU.sparse.map"
_SPARSE_PAIR = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")  # once for each region
_SPARSE_SIZES = (b"GNU.sparse.realsize", b"GNU.sparse.size")
_RECORD_LENGTH = re.compile(rb"([1-9][0-9]{0,6}) ")
_DECIMAL = re.compile(rb"(-?)([0-9]{1,20})(?:\.([0-9]*))?")


class Entry(msgspec.Struct, kw_only=True):
    """One member of an archive. target: of links; mode: without the type's bits; size: 0 but for files."""

    name: str
    kind: Kind
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    target: str
    device: tuple[int, int]
    xattrs: dict[str, bytes]


class Hole(NamedTuple):
    """A part of a file that is zeros, and takes no space in the archive."""

    size: int


Piece = memoryview | Hole


class _Region(NamedTuple):
    """A region of a sparse file that has data."""

    offset: int
    size: int


class _Member(NamedTuple):
    """An entry, and how many bytes of content follow its header. regions: of a sparse file, in order."""

    entry: Entry
    stored: int
    regions: list[_Region] | None = None


class _Raw(NamedTuple):
    """The fields of a header block that are used."""

    name: bytes
    mode: bytes
    uid: bytes
    gid: bytes
    size: bytes
    mtime: bytes
    checksum: bytes
    type: bytes
    target: bytes
    magic: bytes
    version: bytes
    user: bytes
    group: bytes
    major: bytes
    minor: bytes
    prefix: bytes


def read(chunks: Iterator[bytes]) -> Iterator[tuple[Entry, Iterator[Piece]]]:
    """Yield each entry with the pieces of its content, which must be used before the next entry is asked for.

    Ends at the end-of-archive mark or with the chunks; what follows the mark stays in `chunks`.
    """
    source = _Bytes(chunks)
    while member := _next_member(source):
        end = source.taken + member.stored
        yield member.entry, _content(source, member)
        source.skip(end - source.taken)
        source.skip(-member.stored % BLOCK)


def _content(source: "_Bytes", member: _Member) -> Iterator[Piece]:
    if member.regions is None:
        yield from source.pieces(member.stored)
        return
    at = 0
    for offset, size in (*member.regions, _Region(member.entry.size, 0)):
        if offset > at:
            yield Hole(offset - at)
        yield from source.pieces(size)
        at = offset + size


def shown(name: str) -> str:
    """A name from an archive for the text of an error: some bytes have no character, and any length is possible."""
    return name[:200].encode("utf-8", "backslashreplace").decode()


class _Bytes:
    """A reader of exact numbers of bytes from chunks of any length. taken: how many have been read."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self.taken = 0
        self._chunks = chunks
        self._chunk = memoryview(b"")
        self._at = 0

    def take(self, size: int) -> bytes:
        end = self._at + size
        if end <= len(self._chunk):
            start, self._at = self._at, end
            self.taken += size
            return bytes(self._chunk[start:end])
        return b"".join(self.pieces(size))

    def pieces(self, size: int) -> Iterator[memoryview]:
        while size:
            start = self._at
            piece = self._chunk[start : start + size]
            if piece:
                self._at += len(piece)
                self.taken += len(piece)
                size -= len(piece)
                yield piece
            elif not self._refill():
                _malformed("it is cut off")

    def skip(self, size: int) -> None:
        for _ in self.pieces(size):
            pass

    def at_end(self) -> bool:
        return self._at == len(self._chunk) and not self._refill()

    def _refill(self) -> bool:
        for chunk in self._chunks:
            if chunk:
                self._chunk, self._at = memoryview(chunk), 0
                return True
        return False


def _next_member(source: _Bytes) -> _Member | None:
    """Read headers up to and including that of a member; None at the end of the archive."""
    records: dict[bytes, bytes] = {}
    for _ in range(MAX_METADATA_HEADERS):
        block = _next_block(source)
        if block is None:
            if records:
                _malformed("it ends after the extended header of a member")
            return None
        raw = _Raw._make(_HEADER.unpack(block))
        _verify(block, raw)
        if raw.type in b"xXgLK":
            _read_metadata(source, raw, records)
        else:
            return _member(source, raw, records)
    return _malformed(f"more than {MAX_METADATA_HEADERS} extended headers for a member")


def _next_block(source: _Bytes) -> bytes | None:
    """The next header block; None at the two blocks of zeros, or the end of the stream."""
    if source.at_end():
        return None
    block = source.take(BLOCK)
    if block[0] or any(block):
        return block
    if not source.at_end() and any(source.take(BLOCK)):
        _malformed("a lone block of zeros")
    return None


def _verify(block: bytes, raw: _Raw) -> None:
    """Check the sum of all bytes, with the field itself as spaces; some old programs summed signed bytes."""
    expected = _number(raw.checksum, "checksum")
    unsigned = sum(block) - sum(raw.checksum) + 8 * 32
    if unsigned != expected:
        outside = block[:148] + block[156:]
        if unsigned - 256 * sum(byte > 127 for byte in outside) != expected:
            _malformed("wrong checksum of a header")


# --- extended headers ---


def _read_metadata(source: _Bytes, raw: _Raw, records: dict[bytes, bytes]) -> None:
    """Read an extended header into `records`; global headers, which no writer of layers uses, are skipped."""
    size = _number(raw.size, "size")
    if not 0 <= size <= MAX_METADATA_BYTES:
        _malformed(f"an extended header of {size} bytes")
    data = source.take(size)
    source.skip(-size % BLOCK)
    if raw.type in b"xX":
        pairs = list(_pax_records(data))
        records.update(pairs)
        numbers = [value for key, value in pairs if key in _SPARSE_PAIR]
        if numbers:
            records[_SPARSE_MAP] = b",".join(numbers)
    elif raw.type == b"L":
        records.setdefault(b"path", data.partition(b"\0")[0])
    elif raw.type == b"K":
        records.setdefault(b"linkpath", data.partition(b"\0")[0])


def _pax_records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The records of a pax header, each ``length key=value\\n``; the length counts all of it."""
    at = 0
    while at < len(data):
        match = _RECORD_LENGTH.match(data, at)
        end = at + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(data) or data[end - 1] != ord("\n"):
            _malformed("a pax record without a right length")
        key, equals, value = data[match.end() : end - 1].partition(b"=")
        if not equals or not key:
            _malformed("a pax record without a key")
        yield key, value
        at = end


# --- members ---


def _member(source: _Bytes, raw: _Raw, records: dict[bytes, bytes]) -> _Member:
    entry = _entry(raw, records)
    if entry.kind != "file":
        return _Member(entry, 0)
    stored = entry.size
    if raw.type == b"S":
        regions, entry.size = _old_regions(source, raw)
    elif any(key.startswith(_SPARSE) for key in records):
        start = source.taken
        regions, entry.size = _pax_regions(source, records)
        stored -= source.taken - start
    else:
        return _Member(entry, stored)
    _check_regions(regions, stored, entry.size)
    return _Member(entry, stored, regions)


def _entry(raw: _Raw, records: dict[bytes, bytes]) -> Entry:
    """The entry of a header. size: of the content in the archive."""
    kind = _KINDS.get(raw.type)
    if kind is None:
        raise Unsupported(f"tar: an entry of type {raw.type!r}")
    name = _text(records.get(b"GNU.sparse.name") or records.get(b"path") or _ustar_name(raw))
    if kind == "file" and name.endswith("/"):
        kind = "directory"  # V7 had no type for them
    return Entry(
        name=name,
        kind=kind,
        mode=_number(raw.mode, "mode") & 0o7777,
        uid=_bounded(raw.uid, records, "uid", MAX_ID),
        gid=_bounded(raw.gid, records, "gid", MAX_ID),
        size=_bounded(raw.size, records, "size", MAX_SIZE) if kind == "file" else 0,
        mtime_ns=_mtime(raw, records),
        target=_text(records.get(b"linkpath") or _string(raw.target)),
        device=_device(raw) if kind in ("char", "block") else (0, 0),
        xattrs=_xattrs(records) if records else {},
    )


# --- sparse files ---


def _old_regions(source: _Bytes, raw: _Raw) -> tuple[list[_Region], int]:
    """The regions of an old GNU sparse file, four in the header, more in blocks behind it; and the file's size."""
    fields, more, size = raw.prefix[41:137], raw.prefix[137], raw.prefix[138:150]
    regions: list[_Region] = []
    while True:
        for at in range(0, len(fields), 24):
            offset, length = fields[at : at + 12], fields[at + 12 : at + 24]
            if offset[0]:  # the rest are unused
                regions.append(_Region(_number(offset, "offset"), _number(length, "size")))
        if not more:
            return regions, _number(size, "size")
        if len(regions) > MAX_REGIONS:
            _malformed("a sparse file in too many regions")
        block = source.take(BLOCK)
        fields, more = block[:504], block[504]


def _pax_regions(source: _Bytes, records: dict[bytes, bytes]) -> tuple[list[_Region], int]:
    """The regions of a pax sparse file, from the extended header or from before the data."""
    size = next((records[key] for key in _SPARSE_SIZES if key in records), b"")
    version = records.get(b"GNU.sparse.major", b"0"), records.get(b"GNU.sparse.minor", b"0")
    if version == (b"1", b"0"):
        numbers = list(_numbers_before(source))
    elif _SPARSE_MAP in records and version[0] == b"0":
        text = records[_SPARSE_MAP]
        numbers = [_decimal(number) for number in text.split(b",")] if text else []
    else:
        raise Unsupported("tar: a sparse file of an unknown version")
    if len(numbers) % 2 or len(numbers) > 2 * MAX_REGIONS:
        _malformed("a sparse file with a wrong map")
    return list(map(_Region, numbers[::2], numbers[1::2])), _decimal(size)


def _numbers_before(source: _Bytes) -> Iterator[int]:
    """The numbers before the data, one on each line, in whole blocks; the first is that of the regions."""
    lines = _lines(source)
    regions = _decimal(next(lines))
    if regions > MAX_REGIONS:
        _malformed("a sparse file in too many regions")
    for _ in range(2 * regions):
        yield _decimal(next(lines))


def _lines(source: _Bytes) -> Iterator[bytes]:
    """The lines of whole blocks; a block is read only when all lines of the one before it are used."""
    rest = b""
    while True:
        *lines, rest = (rest + source.take(BLOCK)).split(b"\n")
        if len(rest) > BLOCK:
            _malformed("a sparse file with a wrong map")
        yield from lines


def _check_regions(regions: list[_Region], stored: int, size: int) -> None:
    at = 0
    for region in regions:
        if region.offset < at or region.size < 0:
            _malformed("a sparse file whose regions overlap")
        at = region.offset + region.size
    if not at <= size <= MAX_SIZE or sum(region.size for region in regions) != stored:
        _malformed(f"a sparse file of {size} bytes with a wrong map")


def _decimal(value: bytes) -> int:
    if not value.isdigit() or len(value) > 20:
        _malformed("a number of a sparse file is none")
    return int(value)


# --- fields ---


def _ustar_name(raw: _Raw) -> bytes:
    """The name with its prefix, which only POSIX has: GNU has other fields in its place."""
    name = _string(raw.name)
    if raw.magic == b"ustar\0" and raw.prefix[0]:
        return _string(raw.prefix) + b"/" + name
    return name


def _device(raw: _Raw) -> tuple[int, int]:
    numbers = _number(raw.major, "device"), _number(raw.minor, "device")
    if not (0 <= numbers[0] < 1 << 12 and 0 <= numbers[1] < 1 << 20):
        _malformed(f"device number {numbers}")
    return numbers


def _mtime(raw: _Raw, records: dict[bytes, bytes]) -> int:
    """The time in ns since the epoch; one that no file system can hold becomes the nearest possible."""
    value = records.get(b"mtime")
    if not value:
        return max(0, min(_number(raw.mtime, "mtime"), MAX_SECONDS)) * 10**9
    match = _DECIMAL.fullmatch(value)
    if match is None:
        _malformed("mtime is not a number")
    if match[1]:
        return 0
    fraction = (match[3] or b"")[:9].ljust(9, b"0")
    return min(int(match[2]), MAX_SECONDS) * 10**9 + int(fraction)


def _xattrs(records: dict[bytes, bytes]) -> dict[str, bytes]:
    """The extended attributes, as star and all later programs write them; here an empty value is a value."""
    return {
        _text(key[len(_XATTR) :]): value for key, value in records.items() if key.startswith(_XATTR)
    }


def _bounded(field: bytes, records: dict[bytes, bytes], name: str, highest: int) -> int:
    value = records.get(name.encode())
    if value:
        if not value.isdigit() or len(value) > 20:
            _malformed(f"{name} is not a number")
        number = int(value)
    else:
        number = _number(field, name)
    if not 0 <= number <= highest:
        _malformed(f"{name} {number}")
    return number


def _number(field: bytes, name: str) -> int:
    """The number in a field: octal digits, or base 256 where the first bit is set (GNU, star), also negative."""
    if field[0] & 0x80:
        number = int.from_bytes(field, "big") & ~(0x80 << 8 * (len(field) - 1))
        return number - (1 << 8 * len(field) - 1) if field[0] & 0x40 else number
    digits = field.strip(b" \0")
    try:
        return int(digits, 8) if digits.isdigit() else _absent(digits, name)
    except ValueError:
        return _malformed(f"{name} is not a number")


def _absent(digits: bytes, name: str) -> int:
    return _malformed(f"{name} is not a number") if digits else 0


def _string(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _text(value: bytes) -> str:
    if b"\0" in value:
        _malformed("a name with a NUL character")
    return value.decode("utf-8", "surrogateescape")


def _malformed(why: str) -> NoReturn:
    raise InvalidArgument(f"tar: {why}")
