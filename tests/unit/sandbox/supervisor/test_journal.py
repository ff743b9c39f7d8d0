"""What a supervisor that is killed leaves behind, at each step of moving output to the log."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nodeagent.sandbox.supervisor.journal import Journal, Spool, Transfer
from nodeagent.sandbox.supervisor.logs import Clock, LogFile
from nodeagent.sandbox.supervisor.pump import PipeSource, Stream

PARTS = [b"one\ntw", b"o\nthree\nfo", b"ur\n"]
STEPS = ("take", "begin", "write", "release", "commit")


class Killed(Exception):
    """The supervisor has died here."""


class Crash:
    """Kills at the n-th step, before or after it is done."""

    def __init__(self, number: int, *, after: bool) -> None:
        self.left = number
        self.after = after

    def wrap(self, target: object, name: str) -> None:
        step: Callable[..., object] = getattr(target, name)

        def run(*arguments: object) -> object:
            self.left -= 1
            if self.left == 0 and not self.after:
                raise Killed
            result = step(*arguments)
            if self.left == 0:
                raise Killed
            return result

        setattr(target, name, run)


class Pod:
    """A pipe, a log and a journal that outlive supervisors."""

    def __init__(self, directory: Path, name: str = "stdout") -> None:
        self.name = name
        self.reader, self.writer = os.pipe2(os.O_NONBLOCK)
        self.log_path = directory / "log"
        self.journal = os.open(directory / "journal", os.O_RDWR | os.O_CREAT)

    def supervise(self, crash: Crash | None = None) -> None:
        """Take over, and move what is there."""
        log, clock = LogFile(str(self.log_path)), Clock()
        source = PipeSource(self.reader, Spool(self.journal, self.name))
        journal = Journal(self.journal, self.name)
        stream = Stream(self.name, source, journal)
        stream.recover(log)
        if crash:
            crash.wrap(source, "take")
            crash.wrap(journal, "begin")
            crash.wrap(log, "write")
            crash.wrap(source, "release")
            crash.wrap(journal, "commit")
        try:
            while data := self.take(source):
                stream.transfer(log, data, clock)
        finally:
            log.close()

    def take(self, source: PipeSource) -> bytes:
        try:
            return source.take()
        except BlockingIOError:
            return b""

    def lines(self) -> list[bytes]:
        return [line.split(b" ", 3)[3] for line in self.log_path.read_bytes().splitlines()]

    def close(self) -> None:
        for descriptor in (self.reader, self.writer, self.journal):
            os.close(descriptor)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("number", range(1, len(PARTS) * len(STEPS) + 1))
def test_each_line_is_logged_once_wherever_the_supervisor_dies(
    tmp_path: Path, number: int, after: bool
) -> None:
    pod = Pod(tmp_path)
    crash = Crash(number, after=after)
    for part in PARTS:
        os.write(pod.writer, part)
        try:
            pod.supervise(crash if crash.left > 0 else None)
        except Killed:
            pod.supervise()
    assert crash.left <= 0
    assert pod.lines() == [b"one", b"two", b"three", b"four"]
    pod.close()


def test_a_torn_write_is_undone(tmp_path: Path) -> None:
    pod = Pod(tmp_path)
    crash = Crash(3, after=True)
    os.write(pod.writer, b"one\ntwo\n")
    with pytest.raises(Killed):
        pod.supervise(crash)
    os.truncate(pod.log_path, pod.log_path.stat().st_size - 5)
    pod.supervise()
    assert pod.lines() == [b"one", b"two"]
    pod.close()


def test_a_log_that_was_rotated_meanwhile_is_not_cut(tmp_path: Path) -> None:
    pod = Pod(tmp_path)
    os.write(pod.writer, b"one\n")
    with pytest.raises(Killed):
        pod.supervise(Crash(3, after=True))
    pod.log_path.rename(tmp_path / "log.1")
    pod.log_path.write_bytes(b"x" * 100 + b"\n")
    pod.supervise()
    assert pod.log_path.read_bytes().startswith(b"x" * 100)
    pod.close()


def test_a_journal_of_garbage_length_is_a_new_one(tmp_path: Path) -> None:
    file = os.open(tmp_path / "journal", os.O_RDWR | os.O_CREAT)
    os.write(file, b"short")
    journal = Journal(file, "stdout")
    assert (journal.rest, journal.transfer) == (b"", None)
    os.close(file)


@pytest.mark.parametrize("offset", [0, 2, 6])
def test_a_journal_with_an_impossible_header_is_a_new_one(tmp_path: Path, offset: int) -> None:
    """A place that is none, or a length that nothing here has."""
    file = os.open(tmp_path / "journal", os.O_RDWR | os.O_CREAT)
    Journal(file, "stdout").begin(b"rest", Transfer(1, 2))
    os.pwrite(file, b"\xff" * 4, offset)
    journal = Journal(file, "stdout")
    assert (journal.rest, journal.transfer) == (b"", None)
    os.close(file)
