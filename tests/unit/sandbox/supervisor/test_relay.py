"""Relays on real pipes: nothing is lost, nobody is waited for, and both ends learn that the other has gone."""

import errno
import itertools
import os
import select
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from nodeagent.sandbox.runtime.loop import Loop
from nodeagent.sandbox.supervisor.relay import Relay, Streams

PIPE_BYTES = 64 << 10


ROUNDS = 10  # of the loop, in which all moves that can


def run(loop: Loop) -> None:
    for _ in range(ROUNDS):
        loop.call_after(0, loop.stop)
        loop.run()


class Ends:
    """What others have of two pipes that are relayed: they write the first, and read the second."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        source, self.writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.reader, sink = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.relay = Relay(loop, source, sink)
        self.settled = 0

    def settle(self) -> None:
        self.relay.settle(self._settle)

    def _settle(self) -> None:
        self.settled += 1

    def turn(self) -> None:
        """Let everything happen that can."""
        run(self.loop)

    def fill(self) -> int:
        """Write until there is no room, and nothing is taken any more."""
        written = 0
        while taken := self._write():
            written += taken
            self.turn()
        return written

    def _write(self) -> int:
        try:
            return os.write(self.writer, bytes(PIPE_BYTES))
        except BlockingIOError:
            return 0

    def read(self, count: int = 1 << 20) -> bytes:
        try:
            return os.read(self.reader, count)
        except BlockingIOError:
            return b""

    def close(self, *ends: int) -> None:
        for end in ends:
            os.close(end)
            if end == self.writer:
                self.writer = -1
            else:
                self.reader = -1


@pytest.fixture
def descriptors() -> Iterator[Callable[[], int]]:
    """How many are open; every test gives back all of its own."""

    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    yield count
    assert count() == before


@pytest.fixture
def ends(descriptors: Callable[[], int]) -> Iterator[Ends]:
    with_loop = Ends(Loop())
    yield with_loop
    with_loop.close(*(end for end in (with_loop.writer, with_loop.reader) if end >= 0))
    with_loop.turn()
    with_loop.loop._epoll.close()


def test_what_is_written_can_be_read(ends: Ends) -> None:
    os.write(ends.writer, b"word")
    ends.turn()
    assert ends.read() == b"word"


def test_a_reader_who_is_slow_holds_the_writer_up_and_loses_nothing(ends: Ends) -> None:
    written = ends.fill()
    assert written <= 3 * PIPE_BYTES
    received = 0
    while data := ends.read():
        assert not data.strip(b"\0")
        received += len(data)
        ends.turn()
    assert received == written
    assert ends.fill() == written


def test_the_end_comes_after_the_last_byte(ends: Ends) -> None:
    written = ends.fill()
    ends.close(ends.writer)
    received = 0
    os.set_blocking(ends.reader, True)
    for _ in range(written // PIPE_BYTES):
        received += len(os.read(ends.reader, PIPE_BYTES))
        ends.turn()
    assert received == written
    assert os.read(ends.reader, 1) == b""


@pytest.mark.parametrize("full", [False, True])
def test_a_writer_learns_that_the_reader_has_gone(ends: Ends, full: bool) -> None:
    """At once, though it writes nothing."""
    if full:
        ends.fill()
    ends.close(ends.reader)
    ends.turn()
    poll = select.poll()
    poll.register(ends.writer, 0)
    assert poll.poll(0) == [(ends.writer, select.POLLERR)]


def test_it_is_settled_when_all_that_is_there_can_be_read(ends: Ends) -> None:
    """Though the writer is still there."""
    os.write(ends.writer, b"x" * PIPE_BYTES)
    ends.settle()
    assert ends.settled == 1
    assert ends.read() == b"x" * PIPE_BYTES
    os.write(ends.writer, b"later")
    ends.turn()
    assert (ends.read(), ends.settled) == (b"later", 1)


def test_it_is_not_settled_before_there_is_room(ends: Ends) -> None:
    written = ends.fill()
    ends.settle()
    ends.turn()
    assert ends.settled == 0
    received = 0
    while not ends.settled:
        received += len(ends.read())
        ends.turn()
    assert received + len(ends.read()) == written


def test_an_endless_writer_does_not_keep_it_from_being_settled(ends: Ends) -> None:
    ends.fill()
    ends.settle()
    for _ in range(100):
        ends.read()
        ends.turn()
        ends.fill()
    assert ends.settled == 1


@pytest.mark.parametrize("before", [True, False])
def test_it_is_settled_when_nobody_reads_any_more(ends: Ends, before: bool) -> None:
    ends.fill()
    if before:
        ends.settle()
    ends.close(ends.reader)
    ends.turn()
    if not before:
        ends.settle()
    assert ends.settled == 1


def test_streams_settle_when_all_outputs_have(descriptors: Callable[[], int]) -> None:
    loop, told = Loop(), list[str]()
    (stdout, their_stdout), (stderr, their_stderr) = os.pipe(), os.pipe()
    streams = Streams(loop, None, their_stdout, their_stderr, tty=False)
    assert streams.stdin == -1
    os.write(streams.stdout, b"out")
    os.write(streams.stderr, b"err")
    streams.close_given()
    streams.settle(lambda: told.append("settled"))
    assert (os.read(stdout, 100), os.read(stderr, 100), told) == (b"out", b"err", ["settled"])
    run(loop)
    assert (os.read(stdout, 100), os.read(stderr, 100)) == (b"", b"")
    os.close(stdout)
    os.close(stderr)
    loop._epoll.close()


def test_a_terminal_that_nobody_reads_is_let_go(descriptors: Callable[[], int]) -> None:
    """Also while there is input that its program does not take."""
    loop, told = Loop(), list[str]()
    (their_stdin, stdin), (stdout, their_stdout) = os.pipe(), os.pipe()
    streams = Streams(loop, their_stdin, their_stdout, None, tty=True)
    master, slave = os.openpty()
    tty.setraw(slave)
    streams.connect(master, lambda: told.append("unread"))
    os.close(master)
    os.set_blocking(stdin, False)
    for _ in range(3):
        with suppress(BlockingIOError):
            os.write(stdin, bytes(PIPE_BYTES))
        run(loop)
    assert told == []
    os.close(stdout)
    run(loop)
    assert told == ["unread"]
    streams.disconnect()
    with pytest.raises(termios.error, match="Input/output error"):  # hung up
        termios.tcgetattr(slave)
    os.close(slave)
    os.close(stdin)
    loop._epoll.close()


def test_a_terminal_that_nobody_writes_to_is_let_go_where_nobody_reads_it(
    descriptors: Callable[[], int],
) -> None:
    """A client that only writes has nothing else to show that it has gone."""
    loop, told = Loop(), list[str]()
    their_stdin, stdin = os.pipe()
    streams = Streams(loop, their_stdin, None, None, tty=True)
    master, slave = os.openpty()
    tty.setraw(slave)
    streams.connect(master, lambda: told.append("left"))
    os.close(master)
    os.write(stdin, b"word")
    run(loop)
    assert (os.read(slave, 100), told) == (b"word", [])
    os.close(stdin)
    run(loop)
    assert told == ["left"]
    streams.disconnect()
    os.close(slave)
    loop._epoll.close()


def test_the_end_of_input_is_not_the_end_of_a_terminal_that_is_read(
    descriptors: Callable[[], int],
) -> None:
    loop, told = Loop(), list[str]()
    (their_stdin, stdin), (stdout, their_stdout) = os.pipe(), os.pipe()
    streams = Streams(loop, their_stdin, their_stdout, None, tty=True)
    master, slave = os.openpty()
    streams.connect(master, lambda: told.append("left"))
    os.close(master)
    os.close(stdin)
    run(loop)
    assert told == []
    os.close(stdout)
    run(loop)
    assert told == ["left"]
    streams.disconnect()
    os.close(slave)
    loop._epoll.close()


def test_the_end_of_input_is_relayed(descriptors: Callable[[], int]) -> None:
    loop = Loop()
    their_stdin, stdin = os.pipe()
    streams = Streams(loop, their_stdin, None, None, tty=False)
    reader = os.dup(streams.stdin)
    streams.close_given()
    os.write(stdin, b"last")
    os.close(stdin)
    run(loop)
    assert (os.read(reader, 100), os.read(reader, 100)) == (b"last", b"")
    os.close(reader)
    loop._epoll.close()


def test_ends_that_cannot_be_watched_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the relay's, and nobody else would close them."""
    loop = Loop()
    watch = loop.watch
    watched: list[int] = []

    def watch_one(descriptor: int, *arguments: Any) -> None:
        if watched:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        watched.append(descriptor)
        watch(descriptor, *arguments)

    monkeypatch.setattr(loop, "watch", watch_one)
    (source, writer), (reader, sink) = os.pipe(), os.pipe()
    with pytest.raises(OSError, match="No space left"):
        Relay(loop, source, sink)
    for end in (source, sink):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(end)
    os.close(writer)
    os.close(reader)


@pytest.mark.parametrize("number", [1, 2])
def test_what_cannot_be_connected_to_a_terminal_waits(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    loop = Loop()
    (source, writer), (reader, sink), (master, slave) = os.pipe(), os.pipe(), os.openpty()
    streams = Streams(loop, source, sink, None, tty=True)
    dup, calls = os.dup, itertools.count(1)

    def fail(descriptor: int) -> int:
        if next(calls) == number:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return dup(descriptor)

    monkeypatch.setattr(os, "dup", fail)
    with pytest.raises(OSError, match="Too many open files"):
        streams.connect(master, lambda: None)
    streams.close_waiting()
    streams.disconnect()
    for end in (source, sink):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(end)
    for end in (writer, reader, master, slave):
        os.close(end)
