"""The header blocks of SPDY/3.1: names and values, compressed by one zlib stream per direction of a connection.

Draft 3.1, 2.6.10 (name/value header block) and 2.6.10.1 (compression, and its dictionary).
"""

import struct
import zlib

MAX_BLOCK_BYTES = 16 << 10
MAX_HEADERS = 64

_LENGTH = struct.Struct("!I")

_DICTIONARY_WORDS = (
    "options|head|post|put|delete|trace|accept|accept-charset|accept-encoding|accept-language|accept-ranges|age|allow|"
    "authorization|cache-control|connection|content-base|content-encoding|content-language|content-length|"
    "content-location|content-md5|content-range|content-type|date|etag|expect|expires|from|host|if-match|"
    "if-modified-since|if-none-match|if-range|if-unmodified-since|last-modified|location|max-forwards|pragma|"
    "proxy-authenticate|proxy-authorization|range|referer|retry-after|server|te|trailer|transfer-encoding|upgrade|"
    "user-agent|vary|via|warning|www-authenticate|method|get|status|200 OK|version|HTTP/1.1|url|public|set-cookie|"
    "keep-alive|origin"
).split("|")

_DICTIONARY_TAIL = (
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505"
    "203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized"
    "403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable"
    "Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT"
    "chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,"
    "text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0."
)

DICTIONARY = b"".join(_LENGTH.pack(len(w)) + w.encode() for w in _DICTIONARY_WORDS) + (
    _DICTIONARY_TAIL.encode()
)


class HeaderError(ValueError):
    """A block that breaks the format or a bound; the zlib stream cannot be read on after it."""


class Compressor:
    """A writer of the blocks of one direction. They have a few bytes, so a window of 512 is enough."""

    def __init__(self) -> None:
        self._deflate = zlib.compressobj(wbits=9, memLevel=1, zdict=DICTIONARY)

    def encode(self, headers: dict[str, str]) -> bytes:
        parts = [_LENGTH.pack(len(headers))]
        for pair in headers.items():
            for text in pair:
                raw = text.encode()
                parts += _LENGTH.pack(len(raw)), raw
        return self._deflate.compress(b"".join(parts)) + self._deflate.flush(zlib.Z_SYNC_FLUSH)


class Decompressor:
    """A reader of the blocks of one direction, which bounds what they expand to."""

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(zdict=DICTIONARY)

    def decode(self, block: bytes) -> dict[str, str]:
        """The headers by their names in lower case. A value of several parts has NUL between them."""
        try:
            plain = self._inflate.decompress(block, MAX_BLOCK_BYTES + 1)
        except zlib.error as error:
            raise HeaderError(f"header block: {error}") from None
        if len(plain) > MAX_BLOCK_BYTES:
            raise HeaderError(f"header block: more than {MAX_BLOCK_BYTES} bytes")
        return _parse(plain)


def _parse(plain: bytes) -> dict[str, str]:
    try:
        return _pairs(plain)
    except (struct.error, UnicodeDecodeError) as error:
        raise HeaderError(f"header block: {error}") from None


def _pairs(plain: bytes) -> dict[str, str]:
    (count,) = _LENGTH.unpack_from(plain)
    if count > MAX_HEADERS:
        raise HeaderError(f"header block: more than {MAX_HEADERS} headers")
    headers: dict[str, str] = {}
    position = _LENGTH.size
    for _ in range(count):
        name, position = _text(plain, position)
        value, position = _text(plain, position)
        if not name or name.lower() in headers:
            raise HeaderError(f"header block: name {name!r} is empty or twice there")
        headers[name.lower()] = value
    if position != len(plain):
        raise HeaderError("header block: bytes behind the last header")
    return headers


def _text(plain: bytes, position: int) -> tuple[str, int]:
    (length,) = _LENGTH.unpack_from(plain, position)
    start = position + _LENGTH.size
    end = start + length
    if end > len(plain):
        raise HeaderError("header block: cut off")
    return plain[start:end].decode(), end
