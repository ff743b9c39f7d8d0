"""Decompression of layers and archives: gzip, zstd, or none, as the content itself says."""

import gzip
import io
from collections.abc import Callable, Iterator
from typing import BinaryIO, Protocol

import zstandard
from isal import igzip, isal_zlib

from nodeagent.errors import InvalidArgument

CHUNK_BYTES = 256 << 10
MAX_ZSTD_WINDOW_BYTES = 128 << 20  # what `zstd --long` uses at most
_DAMAGE: tuple[type[Exception], ...] = (
    gzip.BadGzipFile,
    EOFError,
    isal_zlib.IsalError,  # type: ignore[assignment]
    zstandard.ZstdError,
)
_GZIP = b"\x1f\x8b\x08"
_ZSTD = b"\x28\xb5\x2f\xfd"


class _Readable(Protocol):
    def read1(self, size: int, /) -> bytes: ...


_gunzip: Callable[[BinaryIO], _Readable] = igzip.open


def decompressed(source: io.RawIOBase | BinaryIO) -> Iterator[bytes]:
    """The content in chunks of at most CHUNK_BYTES; several gzip members or zstd frames are one content.

    A zstd stream that is cut off may end without an error: whoever cares compares a digest.
    """
    head = b""
    while len(head) < len(_ZSTD) and (more := source.read(len(_ZSTD) - len(head))):
        head += more
    whole = io.BufferedReader(_Rejoined(head, source), CHUNK_BYTES)
    if head.startswith(_GZIP):
        return _chunks(_gunzip(whole), "gzip")
    if head.startswith(_ZSTD):
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW_BYTES)
        frames = decompressor.stream_reader(whole, CHUNK_BYTES, read_across_frames=True)
        return _chunks(frames, "zstd")
    return _chunks(whole, "")


def _chunks(stream: _Readable, name: str) -> Iterator[bytes]:
    try:
        while chunk := stream.read1(CHUNK_BYTES):
            yield chunk
    except _DAMAGE as error:
        raise InvalidArgument(f"damaged {name} data: {error}") from None


class _Rejoined(io.RawIOBase):
    """A stream of which some bytes have been read already."""

    def __init__(self, head: bytes, rest: io.RawIOBase | BinaryIO) -> None:
        self._head = head
        self._rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        if not self._head:
            return self._rest.readinto(buffer)  # type: ignore[union-attr]
        data = self._head[: len(buffer)]
        self._head = self._head[len(data) :]
        buffer[: len(data)] = data
        return len(data)
