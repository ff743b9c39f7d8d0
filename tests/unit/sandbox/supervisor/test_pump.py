"""How much a container may write before it has to wait, and what a pump makes of a pipe."""

import errno
import fcntl
import os
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nodeagent.sandbox.runtime.loop import Loop
from nodeagent.sandbox.spec import LogLimit
from nodeagent.sandbox.supervisor import pump as pump_module
from nodeagent.sandbox.supervisor.logs import Clock
from nodeagent.sandbox.supervisor.pump import Allowance, Pump
from tests.support.node import wait_for

MS = 1_000_000


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The monotonic clock, in ns."""
    at = [5_000 * MS]
    monkeypatch.setattr(time, "monotonic_ns", lambda: at[0])
    return at


def test_what_was_not_spent_may_be_written_at_once(now: list[int]) -> None:
    allowance = Allowance(LogLimit(bytes_per_second=1000, burst_bytes=500))
    assert [allowance.spend(400), allowance.spend(50)] == [0, 0]
    now[0] += 3600_000 * MS
    assert [allowance.spend(499), allowance.spend(51)] == [0, 51]


def test_a_debt_is_waited_for(now: list[int]) -> None:
    allowance = Allowance(LogLimit(bytes_per_second=1000, burst_bytes=500))
    wait_ms = allowance.spend(2500)
    assert wait_ms == 2001
    now[0] += wait_ms * MS
    assert allowance.spend(0) == 0


def test_over_a_long_time_the_rate_holds(now: list[int]) -> None:
    allowance = Allowance(LogLimit(bytes_per_second=1 << 20, burst_bytes=1 << 20))
    begin, written = now[0], 0
    while now[0] < begin + 60_000 * MS:
        written += 3 << 20
        now[0] += allowance.spend(3 << 20) * MS
    assert 60 << 20 <= written <= 64 << 20


class Output:
    """A pipe with a pump at its end."""

    def __init__(
        self, directory: Path, limit: LogLimit | None = None, *, start: bool = True
    ) -> None:
        self.loop = Loop()
        self.path = directory / "log"
        self.reader, self.writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        journal = os.open(directory / "journal", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        self.pump = Pump(self.loop, {"stdout": self.reader}, journal, Clock(), limit)
        if start:
            self.pump.start(str(self.path))

    def run(self, ms: int) -> None:
        self.loop.call_after(ms, self.loop.stop)
        self.loop.run()

    def lines(self) -> list[bytes]:
        return [line.split(b" ", 3)[3] for line in self.path.read_bytes().splitlines()]

    def has_logged(self, line: bytes) -> bool:
        self.run(5)
        return self.path.exists() and line in self.lines()

    def is_drained(self) -> bool:
        self.run(5)
        return fcntl.ioctl(self.reader, termios.FIONREAD, bytes(4)) == bytes(4)

    def close(self) -> None:
        self.pump.close()
        os.close(self.reader)
        if self.writer >= 0:
            os.close(self.writer)


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[Output]:
    """A minute for each line."""
    output = Output(tmp_path, LogLimit(bytes_per_second=4096 // 60, burst_bytes=1))
    yield output
    output.close()


def test_above_the_limit_output_stays_in_the_pipe(limited: Output) -> None:
    os.write(limited.writer, b"one\n")
    limited.run(20)
    os.write(limited.writer, b"two\n")
    limited.run(20)
    assert limited.lines() == [b"one"]
    limited.pump.finish()
    assert limited.lines() == [b"one", b"two"]


def test_it_is_held_back_for_as_long_as_has_passed(
    limited: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for the whole pause, which the end of the container may cut short."""
    os.write(limited.writer, b"one\n")
    limited.run(20)
    paused_at = limited.pump._paused_at
    monkeypatch.setattr(time, "monotonic_ns", lambda: paused_at + 7 * MS)
    assert limited.pump.held_back_ms == 7
    limited.pump.finish()
    monkeypatch.setattr(time, "monotonic_ns", lambda: paused_at + 100 * MS)
    assert limited.pump.held_back_ms == 7


def test_a_closed_end_is_no_reason_to_look_again_and_again(limited: Output) -> None:
    os.write(limited.writer, b"one\n")
    limited.run(20)
    os.close(limited.writer)
    limited.writer = -1
    before = time.process_time()
    limited.run(500)
    assert time.process_time() - before < 0.1


def test_output_that_cannot_be_read_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, and not for as long as the descriptor is ready."""
    output = Output(tmp_path)
    os.write(output.writer, b"one\n")
    monkeypatch.setattr(os, "splice", fails_with(errno.EIO))
    monkeypatch.setattr(os, "read", fails_with(errno.EIO))
    output.run(50)
    assert output.pump.streams == ()
    assert capsys.readouterr().err.count("\n") == 1
    output.close()


def test_without_room_for_the_journal_logs_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Output(tmp_path)
    for name in ("splice", "pwrite"):
        monkeypatch.setattr(os, name, fails_with(errno.ENOSPC))
    for _ in range(3):
        os.write(output.writer, b"one\ntwo\n")
        output.run(5)
    output.pump.finish()
    assert output.lines() == [b"one", b"two"] * 3
    output.close()


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EPIPE])
def test_an_attached_client_that_gets_nothing_does_not_end_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    output = Output(tmp_path)
    cut_off: list[str] = []
    client = pump_module.AttachedOutput(lambda: cut_off.append("cut off"))
    reader = client.add("stdout")
    output.pump.attached["client"] = client
    write, writer = os.write, client._writers["stdout"]

    def fail(descriptor: int, data: bytes) -> int:
        if descriptor == writer:
            raise OSError(code, os.strerror(code))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", fail)
    for line in (b"one", b"two"):
        write(output.writer, line + b"\n")
        output.run(20)
    assert (output.lines(), cut_off) == ([b"one", b"two"], ["cut off"])
    os.close(reader)
    output.close()


def fails_with(code: int) -> Callable[..., object]:
    def fail(*_arguments: object, **_options: object) -> object:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC])
@pytest.mark.parametrize("ends", [False, True])
def test_a_log_that_lacks_descriptors_is_opened_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, ends: bool
) -> None:
    """Until then the output stays in its pipe; the end of the container does not wait for the next attempt."""
    monkeypatch.setattr(pump_module, "_RETRY_MS", 1_000_000 if ends else 1)
    output = Output(tmp_path, start=False)
    os.write(output.writer, b"one\n")
    with monkeypatch.context() as patch:
        patch.setattr(pump_module, "LogFile", fails_with(code))
        output.pump.go_on(str(output.path))
        output.run(20)
    assert not output.path.exists()
    if ends:
        output.pump.finish()
    else:
        wait_for("the log", lambda: output.has_logged(b"one"))
    assert output.lines() == [b"one"]
    output.close()


def test_a_log_without_a_place_is_given_up(tmp_path: Path) -> None:
    """It is no shortage that passes: what comes goes to attached clients only, and the program does not wait."""
    output = Output(tmp_path, start=False)
    (tmp_path / "log").mkdir()
    os.write(output.writer, b"one\n")
    output.pump.go_on(str(output.path))
    wait_for("an empty pipe", output.is_drained)
    assert output.pump.dropped_lines == 1
    os.write(output.writer, b"two\nthree\nfour")
    output.pump.finish()
    assert output.pump.dropped_lines == 4
    output.close()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC])
def test_what_an_ended_container_has_left_is_logged_when_that_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Its pipe and its journal are closed by then."""
    monkeypatch.setattr(pump_module, "_RETRY_MS", 1)
    output = Output(tmp_path, start=False)
    os.write(output.writer, b"one\ntwo\nth")
    with monkeypatch.context() as patch:
        patch.setattr(pump_module, "LogFile", fails_with(code))
        output.pump.go_on(str(output.path))
        output.pump.finish()
        output.pump.close()
        output.run(20)
    assert output.pump.dropped_lines == 0
    wait_for("the log", lambda: output.has_logged(b"th"))
    assert output.lines() == [b"one", b"two", b"th"]
    assert output.pump.dropped_lines == 0
    output.pump.write_left()
    assert output.lines() == [b"one", b"two", b"th"]
    output.close()


@pytest.mark.parametrize("ends", ["with the bound", "with the container"])
def test_what_an_ended_container_has_left_is_counted_when_it_is_given_up(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ends: str,
) -> None:
    monkeypatch.setattr(pump_module, "_RETRY_MS", 1 if ends == "with the bound" else 1_000_000)
    monkeypatch.setattr(pump_module, "LogFile", fails_with(errno.EMFILE))
    output = Output(tmp_path, start=False)
    os.write(output.writer, b"one\ntwo\nth")
    output.pump.go_on(str(output.path))
    output.pump.finish()
    if ends == "with the container":
        output.pump.write_left()
    wait_for("the count", lambda: output.is_drained() and output.pump.dropped_lines == 3)
    said = "the last 3 lines of an ended container are lost: [Errno 24] Too many open files"
    assert capsys.readouterr().err.count(said) == 1
    output.pump.write_left()
    assert output.pump.dropped_lines == 3
    output.close()


def test_what_an_ended_container_has_left_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pump_module, "_LATE_BYTES", 0)
    output = Output(tmp_path, start=False)
    os.write(output.writer, b"one\ntwo\n")
    with monkeypatch.context() as patch:
        patch.setattr(pump_module, "LogFile", fails_with(errno.EMFILE))
        output.pump.go_on(str(output.path))
        output.pump.finish()
    output.pump.write_left()
    assert output.pump.dropped_lines == 2
    assert not output.path.exists()
    output.close()


def test_lines_that_were_dropped_stay_counted_when_a_log_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Output(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fails_with(errno.ENOSPC))
        output.pump._take(output.pump._streams["stdout"], b"one\n")
    assert output.pump.dropped_lines == 1
    with monkeypatch.context() as patch:
        patch.setattr(output.pump, "_begin", fails_with(errno.EMFILE))
        output.pump.go_on(str(output.path))
    assert output.pump.dropped_lines == 1
    output.pump.go_on(str(output.path))
    assert output.pump.dropped_lines == 1
    output.close()
