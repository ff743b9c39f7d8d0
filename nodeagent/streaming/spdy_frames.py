"""The frames of SPDY/3.1: their numbers, their layout, and a reader for a parser that is fed piece by piece."""

import struct
from collections.abc import Generator
from enum import IntEnum

VERSION = 3

FLAG_FIN = 0x01
FLAG_UNIDIRECTIONAL = 0x02

CONTROL = 1 << 31
STREAM_ID = (1 << 31) - 1

HEAD = struct.Struct("!II")  # control bit, version and type, or stream; flags and length
STREAM = struct.Struct("!I")
COUNT = struct.Struct("!I")
SYN_STREAM = struct.Struct("!IIBB")  # stream, associated stream, priority, credential slot
STREAM_STATUS = struct.Struct("!II")  # RST_STREAM: stream, status; GOAWAY: last good stream, status


class Type(IntEnum):
    """Control frames, draft 2.6."""

    SYN_STREAM = 1
    SYN_REPLY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PING = 6
    GOAWAY = 7
    HEADERS = 8
    WINDOW_UPDATE = 9


class Reset(IntEnum):
    """Status codes of RST_STREAM, draft 2.6.3."""

    PROTOCOL_ERROR = 1
    REFUSED_STREAM = 3
    CANCEL = 5
    STREAM_ALREADY_CLOSED = 9


class Goodbye(IntEnum):
    """Status codes of GOAWAY, draft 2.6.6."""

    OK = 0
    PROTOCOL_ERROR = 1


def control_frame(kind: Type, payload: bytes) -> bytes:
    return HEAD.pack(CONTROL | VERSION << 16 | kind, len(payload)) + payload


def data_head(stream: int, length: int, *, fin: bool) -> bytes:
    """The head of a frame with `length` bytes of data."""
    return HEAD.pack(stream, (FLAG_FIN if fin else 0) << 24 | length)


class ByteReader:
    """A buffer that gives a parser the bytes that it asks for, in whatever pieces they arrive."""

    def __init__(self) -> None:
        self._chunk = memoryview(b"")

    def feed(self, data: bytes | memoryview) -> None:
        """Take the next bytes; the parser has used all earlier ones."""
        self._chunk = memoryview(data)

    def exactly(self, count: int) -> Generator[None, None, bytes]:
        taken = bytes(self._take(count))
        while len(taken) < count:
            yield
            taken += self._take(count - len(taken))
        return taken

    def some(self, limit: int) -> Generator[None, None, memoryview]:
        """Return at least one byte, without a copy."""
        while not self._chunk:
            yield
        return self._take(limit)

    def skip(self, count: int) -> Generator[None, None, None]:
        while count:
            count -= len((yield from self.some(count)))

    def _take(self, limit: int) -> memoryview:
        taken, self._chunk = self._chunk[:limit], self._chunk[limit:]
        return taken
