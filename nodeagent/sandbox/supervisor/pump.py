"""The transfer of a container's output to its log file, and to attached clients.

Output goes from the pipe to the journal, and stays there until it is in the log: a supervisor that is killed loses
nothing. An attached client that reads too slowly is detached: neither the log nor the container waits for it. Only
where the operator has set a limit, a container that exceeds it is not read from for a while: it waits, and loses
nothing.
"""

import errno
import fcntl
import os
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from nodeagent.errors import FailedPrecondition
from nodeagent.sandbox.runtime.loop import Loop, Timer, report
from nodeagent.sandbox.spec import LogLimit
from nodeagent.sandbox.supervisor.journal import CHUNK_BYTES, Journal, Spool, Transfer
from nodeagent.sandbox.supervisor.logs import (
    Clock,
    LogFile,
    Unopened,
    format_end,
    format_lines,
)

ATTACH_BUFFER_BYTES = 1 << 20

_CHUNKS_PER_TURN = 16
# The bound on draining an ended container's pipes: more than any pipe of an unprivileged process holds.
_DRAIN_CHUNKS = 64
# The least that a limit counts for one read: waking up costs as much as writing so much.
_LEAST_COST_BYTES = 4096
_RETRY_MS = 1000
# To open the log of a container that has ended, before what it has left is given up.
_LATE_ATTEMPTS = 60
# The memory for what it has left: a pipe has 64 KiB, of which a log makes more.
_LATE_BYTES = 4 << 20
_TIOCGPTPEER = 0x5441


# ---- where output comes from ----


class Source(Protocol):
    """An output. Reading never blocks, but raises BlockingIOError; any other OSError is the end, too."""

    descriptor: int

    @property
    def holds(self) -> bool:
        """Whether there is output that was taken and not released, perhaps by an earlier supervisor."""

    def take(self) -> bytes:
        """The next output, the same until it is released; b"" at the end."""

    def release(self) -> None:
        """Drop what was taken: it is in the log."""

    def close(self) -> None:
        """Release what the source holds. The descriptor stays its owner's."""


class PipeSource:
    def __init__(self, descriptor: int, spool: Spool) -> None:
        self.descriptor = descriptor
        self._spool = spool

    @property
    def holds(self) -> bool:
        return self._spool.length > 0

    def take(self) -> bytes:
        if self._spool.length:
            return self._spool.read()
        try:
            return self._spool.read() if self._spool.fill(self.descriptor) else b""
        except BlockingIOError:
            raise
        except OSError:  # no room for the journal: logs are written all the same
            return os.read(self.descriptor, CHUNK_BYTES)

    def release(self) -> None:
        self._spool.clear()

    def close(self) -> None:
        """Do nothing: it holds nothing open."""


class TerminalSource:
    """The master of a pty. splice(2) does not take it: what was read and not yet written, a killed supervisor loses."""

    holds = False

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._slave = _open_slave(descriptor)

    def take(self) -> bytes:
        try:
            return os.read(self.descriptor, CHUNK_BYTES)
        except OSError as error:
            if error.errno == errno.EIO:  # the terminal was hung up
                return b""
            raise

    def release(self) -> None:
        """Do nothing: reading a terminal has removed it."""

    def close(self) -> None:
        if self._slave >= 0:
            os.close(self._slave)
            self._slave = -1


def _open_slave(master: int) -> int:
    """Open the slave, which keeps the output from ending when the container closes its terminal for a moment.

    TIOCGPTPEER (ioctl_tty(2)) needs no path, and works from another mount namespace. -1 where it was hung up.
    """
    try:
        return fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return -1


# ---- where it goes to ----

Log = LogFile | Unopened


class Stream:
    """One of a container's outputs, with what is not yet in its log."""

    def __init__(self, name: str, source: Source, journal: Journal) -> None:
        self.name = name
        self.source = source
        self.journal = journal
        self._label = name.encode()

    def recover(self, log: Log) -> None:
        """Finish, or undo, what a supervisor that was killed had under way."""
        transfer = self.journal.transfer
        if transfer is None:
            return
        # Output that was not released may be in the log, in part or whole: cut the log back, and write it again.
        if self.source.holds:
            if log.inode() == transfer.inode and log.size() > transfer.size:
                log.truncate(transfer.size)
            self.journal.abandon()
        else:
            self.journal.commit()

    def transfer(self, log: Log, data: bytes, clock: Clock) -> int:
        """Write to the log what was taken; returns how many bytes that made."""
        lines, rest = format_lines(self.journal.rest + data, clock.stamp(), self._label)
        # In this order, each step of which a successor finishes or undoes (`recover`).
        self.journal.begin(rest, Transfer(log.inode(), log.size()))
        log.write(lines)
        self.source.release()
        self.journal.commit()
        return len(lines)

    def end(self, log: Log, clock: Clock) -> None:
        log.write(format_end(self.journal.rest, clock.stamp(), self._label))
        self.journal.begin(b"", Transfer(0, 0))
        self.journal.commit()


class Allowance:
    """The amount that a container may write now: a token bucket, which one read may overdraw."""

    def __init__(self, limit: LogLimit) -> None:
        self._rate = limit["bytes_per_second"]
        self._burst = limit["burst_bytes"]
        self._left = float(self._burst)
        self._at = time.monotonic_ns()

    def spend(self, count: int) -> int:
        """Spend it; returns after how many ms there is something to spend again; 0 is at once."""
        now = time.monotonic_ns()
        self._left = min(self._burst, self._left + (now - self._at) * self._rate / 1e9) - count
        self._at = now
        return 0 if self._left > 0 else int(-self._left * 1000 / self._rate) + 1


class AttachedOutput:
    """An attached client: for each stream, the writing end of a pipe whose reading end it has."""

    def __init__(self, cut_off: Callable[[], None]) -> None:
        self._cut_off = cut_off
        self._writers: dict[str, int] = {}

    def add(self, name: str) -> int:
        """Add a stream; returns the reading end. After an OSError, `close` closes what there is."""
        reader, self._writers[name] = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, ATTACH_BUFFER_BYTES)
        except OSError:
            os.close(reader)
            raise
        return reader

    def write(self, name: str, data: bytes) -> None:
        writer = self._writers.get(name)
        if writer is None:
            return
        try:
            complete = os.write(writer, data) == len(data)
        except OSError:  # full, unread, or a shortage: a client's trouble is not the container's
            complete = False
        if not complete:
            self.close()
            self._cut_off()

    def close(self) -> None:
        for writer in self._writers.values():
            os.close(writer)
        self._writers.clear()


class Pump:
    """The pump of one container. The log exists from `start` on; without a path, output goes to clients only.

    outputs: the reading ends of stdout and stderr, or the master of a terminal; they stay their owner's, the journal's
    file belongs to the pump.
    """

    def __init__(
        self,
        loop: Loop,
        outputs: Mapping[str, int],
        journal: int,
        clock: Clock,
        limit: LogLimit | None = None,
    ) -> None:
        self._loop = loop
        self._clock = clock
        self._journal = journal
        self._log: Log | None = None
        self._streams: dict[str, Stream] = {}
        for name, descriptor in outputs.items():
            stream = _stream(name, descriptor, journal)
            self._streams[stream.name] = stream
        self._allowance = Allowance(limit) if limit else None
        self._pause: Timer | None = None
        self._retry: Timer | None = None
        self._wanted: tuple[str, str] | None = None  # the log that cannot be opened yet
        self._paused_at = 0
        self._held_back_ns = 0
        self._dropped_lines = 0  # of logs that are closed
        self._late: Timer | None = None
        self._left: list[bytes] = []  # by an ended container, whose log cannot be opened yet
        self.attached: dict[object, AttachedOutput] = {}

    @property
    def streams(self) -> tuple[str, ...]:
        return tuple(self._streams)

    @property
    def dropped_lines(self) -> int:
        return self._dropped_lines + (self._log.dropped_lines if self._log else 0)

    @property
    def held_back_ms(self) -> int:
        """The time for which the container was not read from, because of its limit, the present pause included."""
        passed = time.monotonic_ns() - self._paused_at if self._pause else 0
        return (self._held_back_ns + passed) // 1_000_000

    def start(self, log_path: str, log_root: str = "") -> None:
        """Begin, or go on where another supervisor was killed. May be repeated."""
        if log_path:
            self._log = self._log or LogFile(log_path, log_root)
        self._begin()

    def _begin(self) -> None:
        if self._log is not None:
            for stream in self._streams.values():
                stream.recover(self._log)
        for stream in self._streams.values():
            if stream.source.holds:  # before any other: the journal keeps one stream's output
                self._take(stream, stream.source.take())
        self._watch()

    def go_on(self, log_path: str, log_root: str = "") -> None:
        """Like start, for a running container: if there is no place for its log any more, it goes on without one.

        A shortage is waited for: until then the output stays where it is.
        """
        self._wanted = None
        if self._retry is not None:
            self._retry.cancel()  # where the end of the container comes before it
        try:
            self.start(log_path, log_root)
        except FailedPrecondition as error:
            report(f"output is not logged any more: {error}")
            self._log = Unopened(0)
            self._begin()
        except OSError as error:
            report(f"output is not logged yet: {error}")
            self._close_log()
            for stream in self._streams.values():
                self._loop.forget(stream.source.descriptor)
            self._wanted = log_path, log_root
            self._retry = self._loop.call_after(_RETRY_MS, lambda: self.go_on(log_path, log_root))

    def _end_pause(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
            self._held_back_ns += time.monotonic_ns() - self._paused_at

    def _watch(self) -> None:
        """Read from all streams; where that cannot be, for a shortage, a moment later."""
        self._end_pause()
        try:
            for stream in self._streams.values():
                self._loop.forget(stream.source.descriptor)
                self._loop.watch(stream.source.descriptor, self._handler(stream))
        except OSError as error:
            report(f"output is not read yet: {error}")
            self._retry = self._loop.call_after(_RETRY_MS, self._watch)

    def _handler(self, stream: Stream) -> Callable[[int], None]:
        def ready(_events: int) -> None:
            if not self._transfer(stream, _CHUNKS_PER_TURN):
                self._end(stream)

        return ready

    def _transfer(self, stream: Stream, chunks: int) -> bool:
        """Move what is there, up to a bound or until it has to wait; False at the end of the stream."""
        try:
            for _ in range(chunks):
                data = stream.source.take()
                if not data:
                    return False
                if self._wait_for(self._take(stream, data)):
                    break
        except BlockingIOError:
            pass
        except OSError as error:  # what is always ready and cannot be read would be tried for ever
            report(f"{stream.name} of a container is given up: {error}")
            return False
        return True

    def _take(self, stream: Stream, data: bytes) -> int:
        """Write it to the log and to clients; returns how many bytes it is in the log."""
        written = len(data)
        if self._log is None:
            stream.source.release()
        else:
            written = stream.transfer(self._log, data, self._clock)
        for output in tuple(self.attached.values()):
            output.write(stream.name, data)
        return written

    def _wait_for(self, written: int) -> bool:
        """Stop reading for a while, and return True, if the container has written more than it may.

        Its descriptors are removed, not masked: epoll always reports EPOLLHUP, of a closed other end (epoll_ctl(2)).
        """
        if self._allowance is None:
            return False
        delay_ms = self._allowance.spend(max(written, _LEAST_COST_BYTES))
        if not delay_ms:
            return False
        for stream in self._streams.values():
            self._loop.forget(stream.source.descriptor)
        self._paused_at = time.monotonic_ns()
        self._pause = self._loop.call_after(delay_ms, self._watch)
        return True

    def _end(self, stream: Stream) -> None:
        self._loop.forget(stream.source.descriptor)
        stream.source.close()
        del self._streams[stream.name]
        if self._log is not None:
            stream.end(self._log, self._clock)

    def reopen_log(self) -> None:
        if self._log is not None:
            self._log.reopen()

    def finish(self) -> None:
        """Take what an ended container has left. Other processes may still hold the pipes; they are not waited for.

        Where its log cannot be opened for a shortage, that is kept, as its pipes go now, and written within a minute.
        """
        self._allowance = None
        if self._wanted is not None:
            self.go_on(*self._wanted)
        wanted, unopened = self._wanted, Unopened(_LATE_BYTES)
        if wanted is not None:
            self._log = unopened
        for stream in tuple(self._streams.values()):
            self._transfer(stream, _DRAIN_CHUNKS)
            self._end(stream)
        self.close()
        if wanted is not None:
            self._wanted, self._left = wanted, unopened.kept
            self._write_left(_LATE_ATTEMPTS)

    def write_left(self) -> None:
        """Write now what an ended container has left, or give it up: whoever would do it later ends."""
        self._write_left(0)

    def _write_left(self, attempts: int) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
        if self._wanted is None or not self._left:
            return
        lines = b"".join(self._left)
        try:
            log = LogFile(*self._wanted)
        except (FailedPrecondition, OSError) as error:
            if attempts and isinstance(error, OSError):
                self._late = self._loop.call_after(
                    _RETRY_MS, lambda: self._write_left(attempts - 1)
                )
                return
            count = lines.count(b"\n")
            report(f"the last {count} lines of an ended container are lost: {error}")
            self._dropped_lines += count
        else:
            log.write(lines)
            self._dropped_lines += log.dropped_lines
            log.close()
        self._left = []

    def close(self) -> None:
        """Close everything that is still open."""
        self._end_pause()
        if self._retry is not None:
            self._retry.cancel()
        for stream in self._streams.values():
            self._loop.forget(stream.source.descriptor)
            stream.source.close()
        self._streams.clear()
        for output in self.attached.values():
            output.close()
        self.attached.clear()
        self._close_log()
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1

    def _close_log(self) -> None:
        if self._log is not None:
            self._dropped_lines += self._log.dropped_lines
            self._log.close()
            self._log = None


def _stream(name: str, descriptor: int, journal: int) -> Stream:
    """The stream of an output, by the name that its descriptor is kept under: a terminal has no stderr."""
    if name == "master":
        return Stream("stdout", TerminalSource(descriptor), Journal(journal, "stdout"))
    source = PipeSource(descriptor, Spool(journal, name))
    return Stream(name, source, Journal(journal, name))
