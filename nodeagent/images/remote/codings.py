"""Content codings of HTTP answers (RFC 9110, 8.4.1): some middle boxes compress without being asked to.

Only gzip and deflate are known, which such boxes use. No piece is long, and no more is decoded than the caller takes.
"""

import zlib
from collections.abc import Iterable, Iterator

PIECE_BYTES = 256 << 10
# Empty members and padding decode to nothing: with an unlimited number of them an answer could go on for ever.
MAX_IDLE_BYTES = 256 << 10

_GZIP = 16 + zlib.MAX_WBITS  # zlib.h, inflateInit2


class Undecodable(Exception):
    """The answer is in a coding that was not asked for, or not in the one that it names."""


def named(headers: Iterable[str]) -> list[str]:
    """The codings that Content-Encoding headers name; identity means none."""
    names = [name.strip().lower() for header in headers for name in header.split(",")]
    return [name for name in names if name not in ("", "identity")]


def decoder_of(headers: Iterable[str]) -> "Decoder | None":
    """The decoder for Content-Encoding headers; None where they name no coding. Raises `Undecodable`."""
    names = named(headers)
    return Decoder(", ".join(names)) if names else None


class Decoder:
    """A decoder of one coding."""

    def __init__(self, name: str) -> None:
        if name not in ("gzip", "x-gzip", "deflate"):
            raise Undecodable(f'its Content-Encoding is "{name[:40]}", which was not asked for')
        self._name = name
        self._idle = 0
        self._stream = None if name == "deflate" else zlib.decompressobj(_GZIP)

    def decode(self, data: bytes) -> Iterator[bytes]:
        """Decode the next bytes, in pieces of at most PIECE_BYTES. Raises `Undecodable`."""
        while data:
            stream = self._stream or _inflater(data[0])
            if stream.eof:  # what follows is padding, or one more member
                rest = data.lstrip(b"\0")
                self._pass_over(len(data) - len(rest))
                data = rest
                if not data:
                    return
                stream = zlib.decompressobj(_GZIP)
            self._stream = stream
            try:
                piece = stream.decompress(data, PIECE_BYTES)
            except zlib.error:
                raise Undecodable(f"damaged {self._name} data") from None
            taken = len(data)
            data = stream.unused_data if stream.eof else stream.unconsumed_tail
            if piece:
                self._idle = 0
                yield piece
            else:
                self._pass_over(taken - len(data))

    def _pass_over(self, size_bytes: int) -> None:
        self._idle += size_bytes
        if self._idle > MAX_IDLE_BYTES:
            raise Undecodable(f"{self._name} data without content")

    def finish(self) -> None:
        """Check that the content is complete. Raises `Undecodable`."""
        if self._stream is None or not self._stream.eof:
            raise Undecodable(f"cut off {self._name} data")


def _inflater(first: int) -> "zlib._Decompress":
    """deflate is zlib's format or, against the standard, the bare one: the first byte tells (RFC 1950, 2.2)."""
    is_zlib = first & 0x0F == zlib.DEFLATED and first >> 4 <= 7
    return zlib.decompressobj(zlib.MAX_WBITS if is_zlib else -zlib.MAX_WBITS)
