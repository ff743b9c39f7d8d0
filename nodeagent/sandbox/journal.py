"""What a supervisor that is killed between two steps of writing a log leaves to its successor.

For each stream of a container: the beginning of a line that goes on, and, while data is on its way from the pipe to the
log file, where it comes from and where it goes to. The journal is a file on tmpfs: it outlives the process, not the
node. Every change becomes valid by the write of one header, which fits into a page and so is never torn.
"""

import os
import struct
from typing import NamedTuple

from nodeagent.sandbox.logs import MAX_LINE_BYTES

REGION_BYTES = 64 << 10

_HEADER = struct.Struct("=B?IIIQQ32s32s")
_EDGE_BYTES = 32
_SLOTS = (4096, 4096 + MAX_LINE_BYTES)


class Transfer(NamedTuple):
    """Data on its way. inode and size: of the log file before; head and tail: the data's first and last bytes."""

    length: int
    inode: int
    size: int
    head: bytes
    tail: bytes

    @classmethod
    def of(cls, data: bytes, inode: int, size: int) -> "Transfer":
        return cls(len(data), inode, size, data[:_EDGE_BYTES], data[-_EDGE_BYTES:])

    def is_of(self, data: bytes) -> bool:
        """Whether `data` begins with what was transferred."""
        data = data[: self.length]
        return self == Transfer.of(data, self.inode, self.size)


class Journal:
    """Of one stream; `file` has a region for each, which begins at `offset`.

    rest: the beginning of a line. transfer: what was under way when the last supervisor died, else None.
    """

    def __init__(self, file: int, offset: int) -> None:
        self._file = file
        self._offset = offset
        self._slot = 0
        self._next = b""
        self.rest = b""
        self.transfer: Transfer | None = None
        self._load()

    def _load(self) -> None:
        data = os.pread(self._file, _HEADER.size, self._offset)
        if len(data) < _HEADER.size:
            return
        slot, under_way, length, next_length, taken, inode, size, head, tail = _HEADER.unpack(data)
        if slot >= len(_SLOTS) or max(length, next_length) > MAX_LINE_BYTES:
            return  # not written here
        self._slot = slot
        self.rest = self._read_slot(slot, length)
        if under_way:
            self._next = self._read_slot(1 - slot, next_length)
            edge = min(taken, _EDGE_BYTES)
            self.transfer = Transfer(taken, inode, size, head[:edge], tail[:edge])

    def begin(self, rest: bytes, transfer: Transfer) -> None:
        """The data of `transfer` is about to be written to the log, and will leave `rest` of a line."""
        if rest:
            self._write(rest, _SLOTS[1 - self._slot])
        self._next = rest
        self.transfer = transfer
        self._write_header()

    def commit(self) -> None:
        """The data is in the log and has left the pipe."""
        self._slot = 1 - self._slot
        self.rest, self._next = self._next, b""
        self.transfer = None
        self._write_header()

    def abandon(self) -> None:
        """The data is still in the pipe, and not in the log."""
        self.transfer = None
        self._write_header()

    def _write_header(self) -> None:
        taken = self.transfer or Transfer(0, 0, 0, b"", b"")
        header = _HEADER.pack(
            self._slot, self.transfer is not None, len(self.rest), len(self._next), *taken
        )
        self._write(header, 0)

    def _write(self, data: bytes, place: int) -> None:
        """Without room for the journal, logs are written all the same."""
        try:
            os.pwrite(self._file, data, self._offset + place)
        except OSError:
            pass

    def _read_slot(self, slot: int, length: int) -> bytes:
        return os.pread(self._file, length, self._offset + _SLOTS[slot])
