"""Relays of bytes between pipes and terminals of which containers have an end and pipes of which the agent has one.

A process in the middle of splice(2) to or from a pipe holds its lock for as long as the other side takes, and whoever
reads, writes or closes the pipe waits for that in the kernel, whatever O_NONBLOCK says. A container can do that to
every pipe of which it has an end. A process in the middle of read(2) or write(2) of a terminal, and waiting for a page
of its buffer from a file system that never answers, holds the line discipline, and whoever closes the master waits for
that. The agent therefore has no end of such a pipe or terminal, but of a pipe whose other end is here: only the
supervisor of the container's own pod can be made to wait.
"""

import errno
import os
import select
from collections.abc import Callable

from nodeagent.sandbox.protocol import close_all
from nodeagent.sandbox.runtime.loop import WRITABLE, Loop

CHUNK_BYTES = 64 << 10  # the capacity of a pipe
# No unprivileged process can have left more than this in a pipe (/proc/sys/fs/pipe-max-size of pipe(7)).
_MAX_LEFT_BYTES = 1 << 20


class Relay:
    """Reads one pipe and writes another, until the first has ended or nobody reads the second. Owns both ends.

    Either may be the master of a terminal, which has ended when nobody has the terminal open any more.

    It copies: splice(2) would hold the lock of the agent's pipe while it waits for the one of the container's.

    unread: called when nobody reads the sink any more, with both ends closed; drained: when the source has ended.
    """

    def __init__(
        self,
        loop: Loop,
        source: int,
        sink: int,
        unread: Callable[[], None] | None = None,
        drained: Callable[[], None] | None = None,
    ) -> None:
        self._is_open = True
        self._unread = unread
        self._drained = drained
        self._loop = loop
        self._source = source
        self._sink = sink
        self._rest = b""
        self._left = 0
        self._settled: Callable[[], None] | None = None
        try:
            for end in (source, sink):
                os.set_blocking(end, False)
            loop.watch(source, self._source_ready)
            loop.watch(sink, self._sink_ready, 0)  # tells when its reader has gone
        except OSError:
            self._is_open = False
            for end in (source, sink):
                loop.forget(end)
                os.close(end)
            raise

    def settle(self, settled: Callable[[], None]) -> None:
        """Call `settled`, once, when all that the source holds now is in the sink, or nobody reads that any more."""
        self._settled = settled
        self._left = _MAX_LEFT_BYTES
        if self._is_open:
            self._take_what_is_there()
        else:
            self._tell_settled()

    def close(self) -> None:
        """Carry nothing more; idempotent."""
        if self._is_open:
            self._close()

    def _close(self) -> None:
        self._is_open = False
        self._rest = b""
        for end in (self._source, self._sink):
            self._loop.forget(end)
            os.close(end)
        self._tell_settled()

    def _source_ready(self, _events: int) -> None:
        self._move()

    def _sink_ready(self, _events: int) -> None:
        if not self._rest:
            if self._has_no_reader():
                self._close_unread()
        elif self._write(self._rest):
            self._loop.change(self._sink, 0)
            self._loop.watch(self._source, self._source_ready)
            self._take_what_is_there()

    def _close_unread(self) -> None:
        self._close()
        if self._unread is not None:
            self._unread()

    def _has_no_reader(self) -> bool:
        poll = select.poll()
        poll.register(self._sink, 0)
        return bool(poll.poll(0))

    def _take_what_is_there(self) -> None:
        """Move all that is there, if `settle` asks for it: otherwise one read for each event is fair to the others."""
        while self._settled is not None and not self._rest and self._move():
            pass

    def _move(self) -> bool:
        """Move one chunk; False when there is nothing now, or nothing any more, or no room for it."""
        try:
            data = self._read()
        except BlockingIOError:
            self._tell_settled()
            return False
        if not data:
            self._close()
            if self._drained is not None:
                self._drained()
            return False
        self._left -= len(data)
        if self._write(data):
            return True
        if self._rest:
            # Removed, not masked: epoll always reports EPOLLHUP, of a closed other end (epoll_ctl(2)).
            self._loop.forget(self._source)
            self._loop.change(self._sink, WRITABLE)
        return False

    def _read(self) -> bytes:
        try:
            return os.read(self._source, CHUNK_BYTES)
        except OSError as error:
            if (
                error.errno == errno.EIO
            ):  # the master of a terminal of which no slave is open any more
                return b""
            raise

    def _write(self, data: bytes) -> bool:
        """Write it; returns whether the sink took all of it, and keeps the rest."""
        try:
            taken = os.write(self._sink, data)
        except BlockingIOError:
            taken = 0
        except OSError:  # EPIPE; of a terminal, EIO
            self._close_unread()
            return False
        self._rest = data[taken:]
        if not self._rest and self._left <= 0:
            self._tell_settled()
        return not self._rest

    def _tell_settled(self) -> None:
        settled, self._settled = self._settled, None
        if settled is not None:
            settled()


class Streams:
    """The standard streams of a command: pipes of its own, or its terminal, relayed from and to the agent's pipes.

    stdin, stdout, stderr: the ends that the command gets; -1 where the agent has none, and with a terminal.
    """

    def __init__(
        self, loop: Loop, stdin: int | None, stdout: int | None, stderr: int | None, *, tty: bool
    ) -> None:
        """The agent's ends belong to the streams from now on. Those of a terminal wait for its master."""
        self.stdin = self.stdout = self.stderr = -1
        self._loop = loop
        self._outputs: list[Relay] = []
        self._terminal: list[Relay] = []
        self._waiting: list[int | None] = []
        if tty:
            self._waiting = [stdin, stdout, stderr]
            return
        pipes = _pipes_for([end for end in (stdin, stdout, stderr) if end is not None])
        if stdin is not None:
            self.stdin, writer = pipes.pop()
            Relay(loop, stdin, writer)
        if stdout is not None:
            reader, self.stdout = pipes.pop()
            self._outputs.append(Relay(loop, reader, stdout))
        if stderr is not None:
            reader, self.stderr = pipes.pop()
            self._outputs.append(Relay(loop, reader, stderr))

    def connect(self, master: int, left: Callable[[], None]) -> None:
        """Relay the terminal. The descriptor stays the caller's.

        left: called when nobody reads any more what the terminal shows; where nobody ever did, when the input ends.

        Raises OSError where there is no descriptor left: what was not connected is still waiting.
        """
        stdin, stdout, stderr = self._waiting
        if stdin is not None:
            drained = left if stdout is None else None  # the output tells better: input has an end
            copy = os.dup(master)
            self._waiting = [stdout, stderr]
            self._terminal.append(Relay(self._loop, stdin, copy, drained=drained))
        if stdout is not None:
            copy = os.dup(master)
            self._waiting = [stderr]  # a terminal has one output
            self._outputs.append(Relay(self._loop, copy, stdout, left))
        self._terminal += self._outputs

    def disconnect(self) -> None:
        """Close the terminal, whatever is still on its way to it or from it."""
        for relay in self._terminal:
            relay.close()

    def close_waiting(self) -> None:
        """Close the agent's ends that waited for a terminal: there will be none."""
        close_all(end for end in self._waiting if end is not None)
        self._waiting = []

    def close_given(self) -> None:
        """Close the command's ends, of which it has its own copies."""
        close_all(end for end in (self.stdin, self.stdout, self.stderr) if end >= 0)
        self.stdin = self.stdout = self.stderr = -1

    def settle(self, settled: Callable[[], None]) -> None:
        """Call `settled` when all that is written now can be read by the agent. What comes later is relayed as well."""
        if self._outputs:
            self._outputs.pop().settle(lambda: self.settle(settled))
        else:
            settled()


def _pipes_for(ends: list[int]) -> list[tuple[int, int]]:
    """A pipe for each; the ends are closed where there cannot be so many."""
    pipes: list[tuple[int, int]] = []
    try:
        pipes.extend(os.pipe2(os.O_CLOEXEC) for _ in ends)
    except OSError:
        close_all([*ends, *(end for pipe in pipes for end in pipe)])
        raise
    return pipes
