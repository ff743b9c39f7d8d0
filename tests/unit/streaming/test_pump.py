import asyncio
import fcntl
import os
import pty
from collections.abc import Iterator

import pytest

from nodeagent.streaming.pump import MAX_LEFT_BYTES, READ_BYTES, Backlog, FlowControl, Sink, Source

PIPE_BYTES = 1 << 20


class Pipe:
    """Both ends non-blocking, with room for a megabyte."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._open = {self.reader, self.writer}

    def close(self, *fds: int) -> None:
        for fd in self._open.intersection(fds or (self.reader, self.writer)):
            os.close(fd)
            self._open.remove(fd)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


async def some_turns() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


class Reading:
    """A source, and what came of it."""

    def __init__(self, fd: int) -> None:
        self.chunks: list[bytes] = []
        self.flow = FlowControl()
        self.source = Source(fd, self.flow, self.chunks.append)

    @property
    def data(self) -> bytes:
        return b"".join(self.chunks)

    async def ended(self) -> None:
        await asyncio.wait_for(self.source.ended.wait(), 5)


# --- sources ---


async def test_a_source_reads_to_the_end(pipe: Pipe) -> None:
    reading = Reading(pipe.reader)
    os.write(pipe.writer, b"x" * 200_000)
    pipe.close(pipe.writer)
    await reading.ended()
    assert reading.data == b"x" * 200_000
    assert max(map(len, reading.chunks)) <= READ_BYTES
    assert not reading.source.failed


async def test_a_closed_gate_stops_a_source_after_one_read(pipe: Pipe) -> None:
    reading = Reading(pipe.reader)
    os.write(pipe.writer, b"x" * 200_000)
    reading.flow.close()
    await some_turns()
    assert reading.chunks == []
    reading.flow.open()
    pipe.close(pipe.writer)
    await reading.ended()
    assert len(reading.data) == 200_000


async def test_a_finished_source_takes_what_is_there(pipe: Pipe) -> None:
    """Though somebody still holds the other end, and the client is slow."""
    os.write(pipe.writer, b"x" * 200_000)
    reading = Reading(pipe.reader)
    reading.flow.close()
    reading.source.finish()
    await some_turns()
    assert reading.chunks == []
    reading.flow.open()
    await reading.ended()
    assert len(reading.data) == 200_000


async def test_a_finished_source_does_not_wait_for_more(pipe: Pipe) -> None:
    reading = Reading(pipe.reader)
    reading.source.finish()
    await reading.ended()
    assert reading.data == b""


async def test_a_finished_source_is_not_kept_by_an_endless_writer(pipe: Pipe) -> None:
    chunks: list[int] = []

    def refill(data: bytes) -> None:
        chunks.append(len(data))
        os.write(pipe.writer, bytes(READ_BYTES))

    source = Source(pipe.reader, FlowControl(), refill)
    os.write(pipe.writer, bytes(READ_BYTES))
    source.finish()
    await asyncio.wait_for(source.ended.wait(), 5)
    assert sum(chunks) == MAX_LEFT_BYTES


async def test_a_terminal_ends_without_a_failure() -> None:
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    reading = Reading(master)
    os.write(slave, b"bye")
    os.close(slave)
    await reading.ended()
    os.close(master)
    assert (reading.data, reading.source.failed) == (b"bye", False)


async def test_a_closed_source_reads_nothing_more(pipe: Pipe) -> None:
    reading = Reading(pipe.reader)
    os.write(pipe.writer, b"x")
    reading.source.close()
    reading.source.finish()
    reading.flow.open()
    await some_turns()
    assert reading.chunks == []


# --- sinks ---


class Writing:
    """A sink, and what its owner is told."""

    def __init__(self) -> None:
        self.shrunk = 0
        self.ends = 0
        self.backlog = Backlog(self._shrink)
        self.sink = Sink(self.backlog)

    def open(self, fd: int) -> None:
        self.sink.open(fd, self._end)

    def write(self, data: bytes) -> None:
        self.sink.write(memoryview(data))

    def _shrink(self) -> None:
        self.shrunk += 1

    def _end(self) -> None:
        self.ends += 1


async def test_a_sink_keeps_all_until_it_is_open(pipe: Pipe) -> None:
    writing = Writing()
    writing.write(b"early ")
    writing.write(b"bird")
    assert writing.backlog.size == 10
    writing.open(pipe.writer)
    await some_turns()
    assert os.read(pipe.reader, 100) == b"early bird"
    assert writing.backlog.size == 0


async def test_a_sink_writes_at_once_what_it_can(pipe: Pipe) -> None:
    writing = Writing()
    writing.open(pipe.writer)
    writing.write(b"now")
    assert os.read(pipe.reader, 100) == b"now"
    assert writing.backlog.size == 0


async def test_a_sink_keeps_what_its_reader_does_not_take(pipe: Pipe) -> None:
    writing = Writing()
    writing.open(pipe.writer)
    writing.write(b"x" * (PIPE_BYTES + 1000))
    writing.write(b"y" * 1000)
    writing.sink.end()
    assert writing.backlog.size == 2000
    received = b""
    while len(received) < PIPE_BYTES + 2000:
        await asyncio.sleep(0)
        try:
            received += os.read(pipe.reader, 1 << 20)
        except BlockingIOError:
            pass
    await asyncio.wait_for(writing.sink.ended.wait(), 5)
    assert received == b"x" * (PIPE_BYTES + 1000) + b"y" * 1000
    assert (writing.backlog.size, writing.ends) == (0, 1)


@pytest.mark.parametrize("early", [True, False])
async def test_the_end_is_told_once(pipe: Pipe, early: bool) -> None:
    writing = Writing()
    if early:
        writing.sink.end()
    writing.open(pipe.writer)
    writing.sink.end()
    writing.sink.discard()
    assert writing.ends == 1
    assert writing.sink.ended.is_set()


@pytest.mark.parametrize("kept", [0, 100])
async def test_a_sink_without_a_reader_throws_all_away(pipe: Pipe, kept: int) -> None:
    writing = Writing()
    writing.write(b"x" * kept)
    writing.open(pipe.writer)
    pipe.close(pipe.reader)
    await some_turns()
    writing.write(b"lost")
    writing.write(b"lost as well")
    await asyncio.wait_for(writing.sink.ended.wait(), 5)
    assert (writing.backlog.size, writing.ends) == (0, 1)


async def test_a_discarded_sink_gives_its_bytes_back() -> None:
    writing = Writing()
    writing.write(b"x" * 100)
    writing.sink.discard()
    writing.write(b"more")
    assert (writing.backlog.size, writing.shrunk) == (0, 1)
