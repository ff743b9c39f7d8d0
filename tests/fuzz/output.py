"""A container's output on its way to the log, while the container does what it likes to the pipes.

An input is a script: pairs of an operation and a number, about two pipes that a pump reads. One operation kills the
supervisor at a system call, done or not, and lets a successor go on.
"""

import fcntl
import os
import re
import struct
import tempfile
import termios
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

from nodeagent.sandbox.runtime.loop import Loop
from nodeagent.sandbox.supervisor.logs import Clock
from nodeagent.sandbox.supervisor.pump import Pump
from tests.fuzz.target import Target

LINE = re.compile(
    rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z (?P<stream>stdout|stderr) (?P<tag>[FP]) (?P<text>[^\n]*)\n"
)
# What a supervisor does to the outside while it moves output; it may be killed before or after any of them.
CALLS = ("splice", "pwrite", "write", "ftruncate")
MAX_STEPS = 100


class Killed(BaseException):
    """The supervisor has died here."""


class End:
    """The container's end of an output. expected: what has to be in the log of it in the end."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.expected = bytearray()

    def write(self, data: bytes) -> None:
        try:
            self.expected += data[: os.write(self.writer, data)]
        except BlockingIOError:
            pass

    def splice(self, length: int) -> None:
        """Pages of a file, which change after they were written: to what the log has, or to the same length of it."""
        pages = os.memfd_create("pages", os.MFD_CLOEXEC)
        try:
            os.write(pages, b"p" * length)
            written = os.splice(pages, self.writer, length, offset_src=0)
            self.expected += b"p" * written
            os.pwrite(pages, b"q" * length, 0)
        except BlockingIOError:
            pass
        finally:
            os.close(pages)

    def steal(self, length: int) -> None:
        """Read from the pipe what the pump has not taken yet; the rest of a packet goes with its beginning."""
        before = self._held()
        try:
            os.read(self.reader, length)
        except BlockingIOError:
            return
        begin = len(self.expected) - before
        del self.expected[begin : begin + before - self._held()]

    def _held(self) -> int:
        (held,) = struct.unpack("i", fcntl.ioctl(self.reader, termios.FIONREAD, bytes(4)))
        return int(held)

    def set_packets(self, on: bool) -> None:
        flags = fcntl.fcntl(self.writer, fcntl.F_GETFL)
        flags = flags | os.O_DIRECT if on else flags & ~os.O_DIRECT
        fcntl.fcntl(self.writer, fcntl.F_SETFL, flags)

    def resize(self, size: int) -> None:
        try:
            fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, size)
        except OSError:
            pass  # more is in it, or it is too large for this user

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


class Container:
    """Two outputs, a journal and a log, which outlive supervisors."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ends = {"stdout": End(), "stderr": End()}
        self.kill_at: tuple[int, bool] | None = None
        self.rotated = 0
        self._supervise()

    def _supervise(self) -> None:
        path = self.directory / "journal"
        journal = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        readers = {name: end.reader for name, end in self.ends.items()}
        self.loop = Loop()
        self.pump = Pump(self.loop, readers, journal, Clock())
        self.pump.start(str(self.directory / "log"))

    def run(self) -> None:
        """A round of the supervisor, which it may not survive."""
        self.loop.call_after(0, self.loop.stop)
        try:
            with killed_at(self.kill_at):
                self.loop.run()
        except Killed:
            self.pump.close()
            self._supervise()
        self.kill_at = None

    def rotate(self) -> None:
        (self.directory / "log").rename(self.directory / f"log.{self.rotated}")
        self.rotated += 1
        self.pump.reopen_log()

    def finish(self) -> bytes:
        """Returns the whole log."""
        self.pump.finish()
        names = [*(f"log.{number}" for number in range(self.rotated)), "log"]
        return b"".join((self.directory / name).read_bytes() for name in names)

    def close(self) -> None:
        self.pump.close()
        for end in self.ends.values():
            end.close()


@contextmanager
def killed_at(place: tuple[int, bool] | None) -> Iterator[None]:
    """Raise `Killed` at the n-th of the calls, instead of it or after it."""
    if place is None:
        yield
        return
    left, done = place

    def replaced(call: Callable[..., object]) -> Callable[..., object]:
        def run(*arguments: object, **options: object) -> object:
            nonlocal left
            left -= 1
            if left:
                return call(*arguments, **options)
            if done:
                call(*arguments, **options)
            raise Killed

        return run

    with ExitStack() as stack:
        for name in CALLS:
            stack.enter_context(mock.patch.object(os, name, replaced(getattr(os, name))))
        yield


def output(data: bytes) -> None:
    """Each byte is in the log once and in its order, whatever happens; a line of the log is always whole."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        container = Container(Path(directory))
        try:
            for operation, number in zip(data[0 : 2 * MAX_STEPS : 2], data[1::2], strict=False):
                _act(container, operation, number)
            log = container.finish()
        finally:
            container.close()
    found = [LINE.fullmatch(line) for line in re.findall(rb"[^\n]*\n?", log) if line]
    assert all(found)
    for name, end in container.ends.items():
        written = bytes(end.expected).replace(b"q", b"p")
        text = b"".join(
            match["text"] + (b"\n" if match["tag"] == b"F" else b"")
            for match in found
            if match and match["stream"] == name.encode()
        ).replace(b"q", b"p")
        assert text == written


def _act(container: Container, operation: int, number: int) -> None:
    end = container.ends["stderr" if operation & 0x80 else "stdout"]
    match operation & 0x0F:
        case 0:
            end.write(b"x" * number)
        case 1:
            end.write(b"line\n" * number)
        case 2:
            end.write(b"y" * (number << 8))
        case 3:
            end.splice(number << 6)
        case 4:
            end.steal(number << 4)
        case 5:
            end.set_packets(bool(number & 1))
        case 6:
            end.resize(4096 << (number & 7))
        case 7:
            container.kill_at = (number & 0x3F) + 1, bool(number & 0x40)
        case 8:
            container.rotate()
        case _:
            container.run()


SCRIPTS = (
    b"\x01\x03\x0f\x00\x00\x05\x81\x02\x0f\x00\x08\x00\x01\x01\x0f\x00",
    b"\x05\x01\x01\x08\x00\x05\x00\x06\x0f\x00\x85\x01\x80\x09\x81\x09\x0f\x00",
    b"\x06\x04\x02\xff\x0f\x00\x02\xff\x04\x10\x0f\x00\x03\xff\x06\x00\x83\x10\x0f\x00",
    b"".join(
        bytes((1, 9, 0x80, 77, 7, number, 0x0F, 0, 0, 5, 0x87, 0x40 | number, 0x0F, 0))
        for number in range(1, 14)
    ),
)

TARGETS = (Target(output, (), SCRIPTS),)
