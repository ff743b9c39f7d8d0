"""The journal of a log, from which a successor goes on if its supervisor is killed between two steps of writing.

It has, for each stream of a container, the beginning of an unfinished line, and, while output is on its way from the
pipe to the log file, the output itself and how long the log was before. The journal is a file on tmpfs: it outlives the
process, not the node. Every change becomes valid by one system call: the write of a header, which fits into a page and
so is never torn, or a change of the file's size.
"""

import os
import struct
from typing import NamedTuple

from nodeagent.sandbox.supervisor.logs import MAX_LINE_BYTES

STREAMS = ("stdout", "stderr")
REGION_BYTES = 64 << 10
CHUNK_BYTES = 64 << 10

# slot, whether a transfer is under way, lengths of the rest and of the next one, inode and size of the log.
_HEADER = struct.Struct("=B?II4xQQ")
_SLOTS = (4096, 4096 + MAX_LINE_BYTES)
_SPOOLS = REGION_BYTES * len(STREAMS)


class Transfer(NamedTuple):
    """Output on its way to the log. inode and size: of the log file before."""

    inode: int
    size: int


class Journal:
    """The journal of one stream; `file` has a region for each, in the order of STREAMS.

    rest: the beginning of a line. transfer: what was under way when the last supervisor died, else None.
    """

    def __init__(self, file: int, stream: str) -> None:
        self._file = file
        self._offset = REGION_BYTES * STREAMS.index(stream)
        self._slot = 0
        self._next = b""
        self.rest = b""
        self.transfer: Transfer | None = None
        self._load()

    def _load(self) -> None:
        data = os.pread(self._file, _HEADER.size, self._offset)
        if len(data) < _HEADER.size:
            return
        slot, under_way, length, next_length, inode, size = _HEADER.unpack(data)
        if slot >= len(_SLOTS) or max(length, next_length) > MAX_LINE_BYTES:
            return  # not written here
        self._slot = slot
        self.rest = self._read_slot(slot, length)
        if under_way:
            self._next = self._read_slot(1 - slot, next_length)
            self.transfer = Transfer(inode, size)

    def begin(self, rest: bytes, transfer: Transfer) -> None:
        """Record that output is about to be written to the log, and will leave `rest` of a line."""
        # Into the slot that is not valid, before the header that announces it: a kill in between changes nothing.
        if rest:
            self._write(rest, _SLOTS[1 - self._slot])
        self._next = rest
        self.transfer = transfer
        self._write_header()

    def commit(self) -> None:
        """Record that the output is in the log, and nowhere else."""
        self._slot = 1 - self._slot
        self.rest, self._next = self._next, b""
        self.transfer = None
        self._write_header()

    def abandon(self) -> None:
        """Record that the output is not in the log, and still where it came from."""
        self.transfer = None
        self._write_header()

    def _write_header(self) -> None:
        transfer = self.transfer or Transfer(0, 0)
        under_way = self.transfer is not None
        lengths = len(self.rest), len(self._next)
        self._write(_HEADER.pack(self._slot, under_way, *lengths, *transfer), 0)

    def _write(self, data: bytes, place: int) -> None:
        """Write to the journal; if it has no room, logs are written all the same."""
        try:
            os.pwrite(self._file, data, self._offset + place)
        except OSError:
            pass

    def _read_slot(self, slot: int, length: int) -> bytes:
        return os.pread(self._file, length, self._offset + _SLOTS[slot])


class Spool:
    """Output that has left its pipe, and is kept at the end of the journal's file until it is in the log.

    splice(2) moves it there in one step, under the pipe's lock. Whenever the supervisor is killed, each byte is either
    in the pipe or in the file; and whatever the container does to its pipe (packets, another size, readers of its own,
    pages that it still writes to), what is in the file stays as it is. Streams take turns: the size of the file says
    whose output it ends with, and how much that is.
    """

    def __init__(self, file: int, stream: str) -> None:
        self._file = file
        self._start = _SPOOLS + CHUNK_BYTES * STREAMS.index(stream)
        size = os.fstat(file).st_size - self._start
        self.length = size if 0 < size <= CHUNK_BYTES else 0

    def fill(self, pipe: int) -> int:
        """Move what is in the pipe, up to CHUNK_BYTES; returns the number of bytes, 0 at the pipe's end.

        Raises BlockingIOError when there is nothing, OSError when there is no room for it.
        """
        self.length = os.splice(
            pipe,
            self._file,
            CHUNK_BYTES,
            offset_dst=self._start,
            flags=os.SPLICE_F_NONBLOCK,
        )
        return self.length

    def read(self) -> bytes:
        return os.pread(self._file, self.length, self._start)

    def clear(self) -> None:
        if self.length:
            os.ftruncate(self._file, _SPOOLS)
            self.length = 0
