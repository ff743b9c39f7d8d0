"""Tar archives as a stream of entries: V7, ustar, pax (POSIX.1-2017, "pax Interchange Format") and GNU.

A pure parser: chunks of bytes in, of any length, entries out; nothing is opened or written. It refuses what it cannot
read faithfully (sparse files, unknown types) and whatever is malformed, by `InvalidArgument` or `Unsupported`. What an
entry's name or target may be is not judged here.
"""

import re
import struct
from collections.abc import Iterator
from typing import Literal, NamedTuple, NoReturn

import msgspec

from nodeagent.errors import InvalidArgument, Unsupported

BLOCK = 512
MAX_METADATA_BYTES = 1 << 20
MAX_METADATA_HEADERS = 16  # before one entry
MAX_SIZE = 1 << 50
MAX_ID = (1 << 32) - 2  # the highest number means "leave it" to chown(2)
MAX_SECONDS = 1 << 33

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
}
_XATTR = b"SCHILY.xattr."
_RECORD_LENGTH = re.compile(rb"([1-9][0-9]{0,6}) ")
_DECIMAL = re.compile(rb"(-?)([0-9]{1,20})(?:\.([0-9]*))?")


class Entry(msgspec.Struct, kw_only=True):
    """One member. target: of links; mode without the type's bits; size is 0 but for files."""

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


def read(chunks: Iterator[bytes]) -> Iterator[tuple[Entry, Iterator[memoryview]]]:
    """Each entry with the pieces of its content, which are to be used before the next entry is asked for.

    Ends at the end-of-archive mark or with the chunks; what follows the mark stays in `chunks`.
    """
    source = _Bytes(chunks)
    while entry := _next_entry(source):
        content = source.pieces(entry.size)
        yield entry, content
        for _ in content:
            pass
        source.skip(-entry.size % BLOCK)


def shown(name: str) -> str:
    """A name from an archive for the text of an error: some bytes have no character, and any length is possible."""
    return name[:200].encode("utf-8", "backslashreplace").decode()


class _Bytes:
    """Exact amounts of bytes out of chunks of any length."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._chunk = memoryview(b"")
        self._at = 0

    def take(self, size: int) -> bytes:
        end = self._at + size
        if end <= len(self._chunk):
            start, self._at = self._at, end
            return bytes(self._chunk[start:end])
        return b"".join(self.pieces(size))

    def pieces(self, size: int) -> Iterator[memoryview]:
        while size:
            start = self._at
            piece = self._chunk[start : start + size]
            if piece:
                self._at += len(piece)
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


def _next_entry(source: _Bytes) -> Entry | None:
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
            return _entry(raw, records)
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
    """The sum of all bytes with the field itself as spaces; some old programs summed signed bytes."""
    expected = _number(raw.checksum, "checksum")
    unsigned = sum(block) - sum(raw.checksum) + 8 * 32
    if unsigned != expected:
        outside = block[:148] + block[156:]
        if unsigned - 256 * sum(byte > 127 for byte in outside) != expected:
            _malformed("wrong checksum of a header")


# --- extended headers ---


def _read_metadata(source: _Bytes, raw: _Raw, records: dict[bytes, bytes]) -> None:
    """Into `records`; those of a global header are defaults that no writer of layers uses: left out."""
    size = _number(raw.size, "size")
    if not 0 <= size <= MAX_METADATA_BYTES:
        _malformed(f"an extended header of {size} bytes")
    data = source.take(size)
    source.skip(-size % BLOCK)
    if raw.type in b"xX":
        records.update(_pax_records(data))
    elif raw.type == b"L":
        records.setdefault(b"path", data.partition(b"\0")[0])
    elif raw.type == b"K":
        records.setdefault(b"linkpath", data.partition(b"\0")[0])


def _pax_records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Each is ``length key=value\\n``; the length counts all of it."""
    at = 0
    while at < len(data):
        match = _RECORD_LENGTH.match(data, at)
        end = at + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(data) or data[end - 1] != ord("\n"):
            _malformed("a pax record without a right length")
        key, equals, value = data[match.end() : end - 1].partition(b"=")
        if not equals or not key:
            _malformed("a pax record without a key")
        if key.startswith(b"GNU.sparse."):
            raise Unsupported("tar: a sparse file")
        yield key, value
        at = end


# --- members ---


def _entry(raw: _Raw, records: dict[bytes, bytes]) -> Entry:
    kind = _KINDS.get(raw.type)
    if kind is None:
        what = "a sparse file" if raw.type == b"S" else f"an entry of type {raw.type!r}"
        raise Unsupported(f"tar: {what}")
    name = _text(records.get(b"path") or _ustar_name(raw))
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


def _ustar_name(raw: _Raw) -> bytes:
    """The prefix is of POSIX: GNU keeps other things in its place."""
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
    """ns since the epoch; times that no file system can hold become the nearest."""
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
    """As star and everybody after it writes them; an empty value is a value here."""
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
    """Octal digits, or base 256 where the first bit is set (GNU, star); negative ones exist there."""
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
