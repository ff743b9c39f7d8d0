"""Decompression of layers and archives: gzip, zstd, or none, as the content itself says.

A zstd frame says how much memory its window takes. Every decoder should have 8 MiB (RFC 8878, 3.1.1.1.2), which is what
encoders use but for ``--ultra`` and ``--long``; these go up to 128 MiB, beyond which zstd itself refuses a frame by
default. So each thread may have a window of 8 MiB, and one of them a larger one.
"""

import gzip
import io
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack
from typing import BinaryIO, Protocol

import zstandard
from isal import igzip, isal_zlib

from nodeagent.errors import InvalidArgument

CHUNK_BYTES = 256 << 10
MAX_ZSTD_WINDOW_BYTES = 128 << 20  # what `zstd --long` uses at most

_SMALL_DECODER_BYTES = 9 << 20  # with a window of 8 MiB
_LARGE_DECODER = threading.Lock()
_DAMAGE: tuple[type[Exception], ...] = (
    gzip.BadGzipFile,
    EOFError,
    isal_zlib.IsalError,  # type: ignore[assignment]
    zstandard.ZstdError,
)
_GZIP = b"\x1f\x8b\x08"
_ZSTD = b"\x28\xb5\x2f\xfd"
# Behind a byte 0x50 to 0x5f: a skippable frame (RFC 8878, 3.1.2), with which pzstd begins.
_ZSTD_SKIPPABLE = b"\x2a\x4d\x18"


class _Readable(Protocol):
    def read1(self, size: int, /) -> bytes: ...


class Waiter(Protocol):
    """A reader of a source that may still be arriving."""

    def take(self, turn: threading.Lock) -> None:
        """Acquire `turn` once all of the source is there. Raises where the source is not wanted any more."""


_gunzip: Callable[[BinaryIO], _Readable] = igzip.open


def decompressed(source: io.RawIOBase | BinaryIO, waiter: Waiter | None = None) -> Generator[bytes]:
    """Decompress into chunks of at most CHUNK_BYTES; several gzip members or zstd frames are one content.

    A truncated zstd stream may end without an error: callers compare a digest. waiter: takes turns with others for a
    large window; without one a source is the administrator's own, and does not wait.
    """
    head = b""
    while len(head) < len(_ZSTD) and (more := source.read(len(_ZSTD) - len(head))):
        head += more
    whole = io.BufferedReader(_Rejoined(head, source), CHUNK_BYTES)
    if head.startswith(_GZIP):
        return _chunks(_gunzip(whole), "gzip")
    if head.startswith(_ZSTD) or (head[1:] == _ZSTD_SKIPPABLE and head[0] >> 4 == 5):
        return _unzstd(whole, waiter)
    return _chunks(whole, "")


def _unzstd(source: BinaryIO, waiter: Waiter | None) -> Generator[bytes]:
    """Decompress zstd. A window takes memory only as it fills, so a check after each chunk is soon enough."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW_BYTES)
    frames = decompressor.stream_reader(source, CHUNK_BYTES, read_across_frames=True)
    with ExitStack() as turn:
        for chunk in _chunks(frames, "zstd"):
            if waiter and decompressor.memory_size() > _SMALL_DECODER_BYTES:
                waiter.take(_LARGE_DECODER)
                turn.callback(_LARGE_DECODER.release)
                waiter = None  # until the end, as the decoder keeps the memory
            yield chunk


def _chunks(stream: _Readable, name: str) -> Generator[bytes]:
    try:
        while chunk := stream.read1(CHUNK_BYTES):
            yield chunk
    except _DAMAGE as error:
        if "too much memory" in str(error):
            largest = MAX_ZSTD_WINDOW_BYTES >> 20
            raise InvalidArgument(
                f"zstd data that needs a window of more than {largest} MiB; compress it anew, "
                "with --long=27 at most"
            ) from None
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
