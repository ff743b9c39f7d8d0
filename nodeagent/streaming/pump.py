"""Flow control on an asyncio loop: sources that read descriptors while the client takes more, sinks that buffer.

Both work on non-blocking pipes, sockets and terminals. Neither owns its descriptor, a thread or a task.
"""

import asyncio
import errno
import os
from collections.abc import Callable

READ_BYTES = 64 << 10  # the capacity of a pipe
# A process that ended cannot have left more than this in a pipe (fs.pipe-max-size), a terminal or a socket.
MAX_LEFT_BYTES = 1 << 20


class FlowControl:
    """The state of a client's connection: closed while it cannot take more, and its sources must not read."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        self.opened.set()
        self._waiting: set[Source] = set()

    def close(self) -> None:
        self.opened.clear()

    def open(self) -> None:
        self.opened.set()
        waiting, self._waiting = self._waiting, set()
        for source in waiting:
            source.resume()

    def wait(self, source: "Source") -> None:
        self._waiting.add(source)


class Source:
    """A reader of a descriptor to its end. `ended` is set then; `failed` tells that an error ended it."""

    def __init__(self, fd: int, flow: FlowControl, on_data: Callable[[bytes], None]) -> None:
        self.ended = asyncio.Event()
        self.failed = False
        self._fd = fd
        self._flow = flow
        self._on_data = on_data
        self._left: int | None = None  # None: until the end
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(fd, self._read)

    def resume(self) -> None:
        """Read again, as the client takes more."""
        if self.ended.is_set():
            return
        if self._left is None:
            self._loop.add_reader(self._fd, self._read)
        else:
            self._loop.call_soon(self._read)

    def finish(self) -> None:
        """Read what is there now, and no more: other processes may keep the other end open for ever."""
        if not self.ended.is_set():
            self._loop.remove_reader(self._fd)
            self._left = MAX_LEFT_BYTES
            self._loop.call_soon(self._read)

    def close(self) -> None:
        """Stop reading."""
        self._loop.remove_reader(self._fd)
        self.ended.set()

    def _read(self) -> None:
        if self.ended.is_set():
            return
        if not self._flow.opened.is_set():
            self._loop.remove_reader(self._fd)
            self._flow.wait(self)
            return
        data = self._next()
        if data:
            self._on_data(data)
        if self._was_last(data):
            self.close()
        elif self._left is not None:
            self._loop.call_soon(self._read)

    def _was_last(self, data: bytes | None) -> bool:
        if data == b"" or self._left is None:
            return data == b""
        self._left -= len(data or b"")
        return data is None or self._left <= 0

    def _next(self) -> bytes | None:
        """Read once: bytes, b"" at the end, None if there are none yet."""
        try:
            return os.read(self._fd, READ_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            # A terminal's master reads EIO once no process has the other end open: that is its end, not a failure.
            self.failed = error.errno != errno.EIO
            return b""


class Backlog:
    """The number of bytes that the sinks of one client keep; on_shrink is called whenever it has become smaller."""

    def __init__(self, on_shrink: Callable[[], None]) -> None:
        self.size = 0
        self._on_shrink = on_shrink

    def grow(self, count: int) -> None:
        self.size += count

    def shrink(self, count: int) -> None:
        self.size -= count
        self._on_shrink()


class Sink:
    """A writer to a descriptor that keeps what does not fit. `ended` is set once it needs the descriptor no more.

    Until `open` everything is kept. After an error, as after `discard`, everything is dropped: the reader is gone, and
    its writer must not be blocked by that.
    """

    def __init__(self, backlog: Backlog) -> None:
        self.ended = asyncio.Event()
        self._backlog = backlog
        self._on_end: Callable[[], None] | None = None
        self._fd = -1
        self._pending = bytearray()
        self._ending = False
        self._loop = asyncio.get_running_loop()

    def open(self, fd: int, on_end: Callable[[], None]) -> None:
        """Write to fd from now on. on_end is called once: after `end` when all is written, or on an error."""
        self._fd, self._on_end = fd, on_end
        if self._pending:
            self._loop.add_writer(fd, self._drain)
        elif self._ending:
            self.discard()

    def write(self, data: memoryview) -> None:
        if self._fd >= 0 and not self._pending:
            data = data[self._take(data) :]
            if data:
                self._loop.add_writer(self._fd, self._drain)
        if not self.ended.is_set():
            self._pending += data
            self._backlog.grow(len(data))

    def end(self) -> None:
        """Note that no more data will come; on_end is called when all is written."""
        self._ending = True
        if self._fd >= 0 and not self._pending:
            self.discard()

    def discard(self) -> None:
        """Drop what is kept and write nothing more."""
        if self.ended.is_set():
            return
        self.ended.set()
        kept = len(self._pending)
        self._pending.clear()
        if self._on_end is not None:
            # Before on_end, which closes it: the loop must not watch a descriptor whose number may be used again.
            self._loop.remove_writer(self._fd)
            self._fd = -1
            self._on_end()
        self._backlog.shrink(kept)

    def _drain(self) -> None:
        taken = self._take(self._pending)
        if self.ended.is_set():
            return
        del self._pending[:taken]
        if not self._pending:
            self._loop.remove_writer(self._fd)
            if self._ending:
                self.discard()
        self._backlog.shrink(taken)

    def _take(self, data: memoryview | bytearray) -> int:
        """Write once and return how many bytes are done with: all of them where there is no reader any more."""
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            return 0
        except OSError:
            self.discard()
            return len(data)
