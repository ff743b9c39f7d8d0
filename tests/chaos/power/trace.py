"""What a process did to the files below a directory: its system calls, recorded by strace, in their order.

strace is attached to the running process: nothing of the code under test knows. SQLite's calls are among them.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.node import wait_for

CALLS = (
    "openat,openat2,open,creat,close,lseek,write,pwrite64,writev,ftruncate,truncate,rename,renameat,renameat2,"
    "unlink,unlinkat,rmdir,mkdir,mkdirat,link,linkat,symlink,symlinkat,mknod,mknodat,fsync,fdatasync,syncfs,sync,"
    "copy_file_range,sendfile,pwritev,pwritev2"
)
_LINE = re.compile(r"(\d+\.\d+) (\w+)\((.*)\) += (-?\d+)(?:<(.*?)>)?[^<]* <(\d+\.\d+)>$")
_DESCRIPTOR = re.compile(r"(?:AT_FDCWD|(\d+))<([^>]*)>(\(deleted\))?$")


@dataclass(frozen=True, slots=True)
class Call:
    """A system call that succeeded. began, ended: seconds since the epoch."""

    began: float
    ended: float
    name: str
    arguments: list[str]
    result: int
    opened: str


def strace() -> str | None:
    return shutil.which("strace")


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Let a process stand still, with all of its threads, while the block runs."""
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_for("a stopped process", lambda: all(_is_stopped(t) for t in _threads(pid)))
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _threads(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/task").iterdir())


def _is_stopped(thread: Path) -> bool:
    """Whether it is stopped, by a signal (T) or, while it is traced, by that as well (t)."""
    try:
        return (thread / "stat").read_text().rpartition(") ")[2][0] in "Tt"
    except (FileNotFoundError, ProcessLookupError):
        return True  # it has ended


@contextmanager
def recorded(pid: int, folder: Path) -> Iterator[list[Call]]:
    """Record the calls of a process while the block runs; the list is filled at its end."""
    folder.mkdir()
    program = strace()
    assert program is not None
    # -ff: a file for each thread, so that no call is printed in two parts.
    options = ["-ff", "-y", "-xx", "-ttt", "-T", "-s", str(1 << 24), "-e", "signal=none"]
    command = [program, *options, "-e", f"trace={CALLS}", "-o", str(folder / "t"), "-p", str(pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as tracer:
        assert tracer.stderr is not None
        while b"attached" not in (line := tracer.stderr.readline()):
            if not line:
                raise RuntimeError("strace could not be attached")
        calls: list[Call] = []
        try:
            yield calls
        finally:
            tracer.send_signal(signal.SIGINT)  # it detaches, and the process goes on
            tracer.stderr.read()
    for file in folder.iterdir():
        with file.open() as lines:
            calls.extend(call for line in lines if (call := parsed(line)) is not None)
    calls.sort(key=lambda call: call.ended)


def parsed(line: str) -> Call | None:
    found = _LINE.match(line.rstrip("\n"))
    if found is None or int(found[4]) < 0:
        return None
    began, name, arguments, result, opened, seconds = found.groups()
    return Call(
        float(began),
        float(began) + float(seconds),
        name,
        _split(arguments),
        int(result),
        text(opened or ""),
    )


def _split(arguments: str) -> list[str]:
    """Split at commas outside of brackets; strings are hexadecimal and have none."""
    parts, depth, start = [], 0, 0
    for at, character in enumerate(arguments):
        if character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and not depth:
            parts.append(arguments[start:at].strip())
            start = at + 1
    return [*parts, arguments[start:].strip()]


def data(argument: str) -> bytes:
    """The bytes of a string argument."""
    return bytes.fromhex(argument.strip('"').replace("\\x", ""))


def vector(argument: str) -> bytes:
    return b"".join(map(data, re.findall(r'iov_base=("[^"]*")', argument)))


def text(hexadecimal: str) -> str:
    return os.fsdecode(data(hexadecimal))


def descriptor(argument: str) -> tuple[int, str]:
    """Number (-1 of the working directory) and path of a descriptor argument; the path is "" of what is deleted."""
    found = _DESCRIPTOR.match(argument)
    if found is None:
        return -1, ""
    return int(found[1] or -1), "" if found[3] else text(found[2])


def path(directory: str, name: str) -> str:
    """The path that a name argument stands for, relative to a descriptor argument."""
    return os.path.normpath(os.path.join(descriptor(directory)[1] or "/deleted", text(name)))
