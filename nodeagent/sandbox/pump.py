"""From a container's output to its log file, and to those who are attached.

Data leaves a pipe only after it is in the log (tee(2)), so that a supervisor that is killed loses nothing. A reader
who is attached and too slow is cut off: neither the log nor the container waits for anybody.
"""

import errno
import fcntl
import os
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from nodeagent.linux import pipes
from nodeagent.sandbox.journal import REGION_BYTES, Journal, Transfer
from nodeagent.sandbox.logs import Clock, LogFile, format_end, format_lines
from nodeagent.sandbox.loop import Loop

STREAMS = ("stdout", "stderr")
ATTACH_BUFFER_BYTES = 1 << 20

_CHUNK_BYTES = 64 << 10
_CHUNKS_PER_TURN = 16
# What an ended container's pipes are drained of: more than any pipe of an unprivileged process holds.
_DRAIN_CHUNKS = 64


class Source(Protocol):
    """Where output comes from. Reading never blocks, but raises BlockingIOError."""

    descriptor: int

    def peek(self) -> bytes:
        """What comes next, b"" at the end."""

    def consume(self, length: int) -> None:
        """Drop as much of what `peek` returned."""

    def holds(self, transfer: Transfer) -> bool:
        """Whether a transfer that was cut off has not been consumed."""


class Workbench(NamedTuple):
    """A pipe to look at data through, and a place to drop it; shared by all pipes of a supervisor."""

    reader: int
    writer: int
    null: int

    @classmethod
    def open(cls) -> "Workbench":
        return cls(*os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK), os.open(os.devnull, os.O_WRONLY))


class PipeSource:
    def __init__(self, descriptor: int, workbench: Workbench) -> None:
        self.descriptor = descriptor
        self._workbench = workbench

    def peek(self) -> bytes:
        length = pipes.tee(self.descriptor, self._workbench.writer, _CHUNK_BYTES)
        return os.read(self._workbench.reader, length) if length else b""

    def consume(self, length: int) -> None:
        try:
            while length:
                length -= os.splice(self.descriptor, self._workbench.null, length)
        except BlockingIOError:
            pass  # the container has opened its own pipe for reading, and taken it

    def holds(self, transfer: Transfer) -> bool:
        try:
            return transfer.is_of(self.peek())
        except BlockingIOError:
            return False


class TerminalSource:
    """The master of a pty, which cannot be looked at without being read."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def peek(self) -> bytes:
        try:
            return os.read(self.descriptor, _CHUNK_BYTES)
        except OSError as error:
            if error.errno == errno.EIO:  # nobody has the slave open
                return b""
            raise

    def consume(self, length: int) -> None:
        """It has gone already."""

    def holds(self, transfer: Transfer) -> bool:
        return False


class Stream:
    """One of a container's outputs, with what the log still lacks of it."""

    def __init__(self, name: str, source: Source, journal: Journal) -> None:
        self.name = name
        self.source = source
        self.journal = journal
        self._label = name.encode()

    def recover(self, log: LogFile) -> None:
        """Finish, or undo, what a supervisor that was killed had under way."""
        transfer = self.journal.transfer
        if transfer is None:
            return
        if self.source.holds(transfer):
            if log.inode() == transfer.inode and log.size() > transfer.size:
                log.truncate(transfer.size)
            self.journal.abandon()
        else:
            self.journal.commit()

    def transfer(self, log: LogFile, data: bytes, clock: Clock) -> None:
        lines, rest = format_lines(self.journal.rest + data, clock.stamp(), self._label)
        self.journal.begin(rest, Transfer.of(data, log.inode(), log.size()))
        log.write(lines)
        self.source.consume(len(data))
        self.journal.commit()

    def end(self, log: LogFile, clock: Clock) -> None:
        log.write(format_end(self.journal.rest, clock.stamp(), self._label))
        self.journal.begin(b"", Transfer(0, 0, 0, b"", b""))
        self.journal.commit()


class Tap:
    """Somebody who is attached: for each stream, the writing end of a pipe whose reading end is theirs."""

    def __init__(self, cut_off: Callable[[], None]) -> None:
        self._cut_off = cut_off
        self._writers: dict[str, int] = {}

    def add(self, name: str) -> int:
        """Returns the reading end."""
        reader, self._writers[name] = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, ATTACH_BUFFER_BYTES)
        return reader

    def write(self, name: str, data: bytes) -> None:
        writer = self._writers.get(name)
        if writer is None:
            return
        try:
            complete = os.write(writer, data) == len(data)
        except (BlockingIOError, BrokenPipeError):
            complete = False
        if not complete:
            self.close()
            self._cut_off()

    def close(self) -> None:
        for writer in self._writers.values():
            os.close(writer)
        self._writers.clear()


class Pump:
    """Of one container. The log file is there from `start` on; without a path, output is only for the attached.

    The sources' descriptors stay their owner's, the journal's belongs to the pump.
    """

    def __init__(
        self, loop: Loop, sources: Mapping[str, Source], journal: int, clock: Clock
    ) -> None:
        self._loop = loop
        self._clock = clock
        self._journal = journal
        self._log: LogFile | None = None
        self._streams = {
            name: Stream(name, source, Journal(journal, REGION_BYTES * STREAMS.index(name)))
            for name, source in sources.items()
        }
        self._dropped_lines = 0
        self.taps: dict[object, Tap] = {}

    @property
    def streams(self) -> tuple[str, ...]:
        return tuple(self._streams)

    @property
    def dropped_lines(self) -> int:
        return self._log.dropped_lines if self._log else self._dropped_lines

    def start(self, log_path: str, log_root: str = "") -> None:
        """Begin, or go on where another supervisor was stopped."""
        if log_path:
            self._log = LogFile(log_path, log_root)
            for stream in self._streams.values():
                stream.recover(self._log)
        for stream in self._streams.values():
            self._watch(stream)

    def _watch(self, stream: Stream) -> None:
        def ready(_events: int) -> None:
            if not self._transfer(stream, _CHUNKS_PER_TURN):
                self._end(stream)

        self._loop.watch(stream.source.descriptor, ready)

    def _transfer(self, stream: Stream, chunks: int) -> bool:
        """Move what is there, up to a bound; False at the end of the stream."""
        try:
            for _ in range(chunks):
                data = stream.source.peek()
                if not data:
                    return False
                self._take(stream, data)
        except BlockingIOError:
            pass
        return True

    def _take(self, stream: Stream, data: bytes) -> None:
        if self._log is None:
            stream.source.consume(len(data))
        else:
            stream.transfer(self._log, data, self._clock)
        for tap in tuple(self.taps.values()):
            tap.write(stream.name, data)

    def _end(self, stream: Stream) -> None:
        self._loop.forget(stream.source.descriptor)
        del self._streams[stream.name]
        if self._log is not None:
            stream.end(self._log, self._clock)

    def reopen_log(self) -> None:
        if self._log is not None:
            self._log.reopen()

    def finish(self) -> None:
        """The container has ended: take what is left. Others may still hold the pipes; nobody waits for them."""
        for stream in tuple(self._streams.values()):
            self._transfer(stream, _DRAIN_CHUNKS)
            self._end(stream)
        self.close()

    def close(self) -> None:
        """Let go of everything that is still open."""
        for stream in self._streams.values():
            self._loop.forget(stream.source.descriptor)
        self._streams.clear()
        for tap in self.taps.values():
            tap.close()
        self.taps.clear()
        if self._log is not None:
            self._dropped_lines = self._log.dropped_lines
            self._log.close()
            self._log = None
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1
