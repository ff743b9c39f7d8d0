"""What is captured of the output of commands: bounded for each stream, and for the node.

A command is never held up, as a probe must not fail because of the output of others: what exceeds a bound is read and
discarded, which is what the CRI asks for. The start of each stream is always kept; it is all that a kubelet looks at.
"""

import asyncio
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

MAX_OUTPUT_BYTES = 16 << 20  # of a stream
MAX_NODE_BYTES = 64 << 20  # of all streams, besides their starts
START_BYTES = 16 << 10  # the kubelet reads 10 KiB of a probe
READ_BYTES = 1 << 16


class Captures:
    """The budget of the node, which every capture takes from and gives back to."""

    def __init__(self, room: int = MAX_NODE_BYTES) -> None:
        self.room = room

    def take(self, size: int) -> int:
        """Take at most `size` bytes; returns how many there were."""
        taken = min(size, self.room)
        self.room -= taken
        return taken

    @contextmanager
    def open(self, what: str) -> "Iterator[Capture]":
        """A capture of one stream. what: said in the log if the node's bound cuts it."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(reader, False)
        capture = Capture(self, what, reader, writer)
        try:
            yield capture
        finally:
            capture.close()


class Capture:
    """The reading end of a pipe.

    The other end is the supervisor's, not the command's: with a pipe of its own a command could block the agent.
    """

    def __init__(self, captures: Captures, what: str, reader: int, writer: int) -> None:
        self.writer = writer
        self._captures = captures
        self._what = what
        self._reader = reader
        self._chunks: list[bytes] = []
        self._kept = 0
        self._taken = 0
        self._is_cut = False

    def take(self) -> bytes:
        """The output; the capture keeps no copy of it."""
        data = b"".join(self._chunks)
        self._chunks.clear()
        return data

    def start(self) -> None:
        """Close our copy of the writing end (the supervisor has its own) and read as data comes."""
        os.close(self.writer)
        self.writer = -1
        asyncio.get_running_loop().add_reader(self._reader, self._read)

    def drain(self) -> None:
        """Take what the pipe holds now; never wait for its end."""
        while self._read():
            pass

    def close(self) -> None:
        if self.writer >= 0:
            os.close(self.writer)
        if self._reader >= 0:
            self._stop()
        self._captures.room += self._taken
        self._taken = 0

    def _read(self) -> bool:
        if self._reader < 0:
            return False
        try:
            data = os.read(self._reader, READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._stop()
            return False
        self._keep(data)
        return True

    def _keep(self, data: bytes) -> None:
        """Keep what both bounds allow; nothing after a gap."""
        wanted = 0 if self._is_cut else min(len(data), MAX_OUTPUT_BYTES - self._kept)
        free = min(wanted, max(0, START_BYTES - self._kept))
        taken = self._captures.take(wanted - free)
        self._taken += taken
        if free + taken:
            self._chunks.append(data[: free + taken])
            self._kept += free + taken
        if free + taken < wanted:
            self._is_cut = True
            log.warning(
                "%s: cut after %d bytes: the output of other commands takes the %d MiB that the agent keeps at once",
                self._what,
                self._kept,
                MAX_NODE_BYTES >> 20,
            )

    def _stop(self) -> None:
        asyncio.get_running_loop().remove_reader(self._reader)
        os.close(self._reader)
        self._reader = -1
