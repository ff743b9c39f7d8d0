"""The pipes of a process that has lost supervisor and launcher are found again, and nothing else in their place."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nodeagent.sandbox.runtime import process


@contextmanager
def running(stdin: int, stdout: int, stderr: int) -> Iterator[int]:
    child = subprocess.Popen(["sleep", "1000"], stdin=stdin, stdout=stdout, stderr=stderr)
    try:
        yield child.pid
    finally:
        child.kill()
        child.wait()


def inode(descriptor: int) -> int:
    return os.fstat(descriptor).st_ino


def test_the_other_ends_of_its_pipes() -> None:
    read_in, write_in = os.pipe()
    read_out, write_out = os.pipe()
    with running(read_in, write_out, write_out) as pid:
        known = {"stdin": inode(read_in), "stdout": inode(write_out), "stderr": 1}
        found = process.reopen_pipes(pid, known)
        assert {name: inode(end) for name, end in found.items()} == {
            "stdin": inode(read_in),
            "stdout": inode(write_out),
        }
        os.write(found["stdin"], b"in")
        assert os.read(read_in, 2) == b"in"
        os.write(write_out, b"out")
        assert os.read(found["stdout"], 3) == b"out"
    for descriptor in (read_in, write_in, read_out, write_out, *found.values()):
        os.close(descriptor)


def test_another_file_with_the_inode_of_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    fifo = os.open(tmp_path / "fifo", os.O_RDWR)
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    with running(file, fifo, file) as pid:
        known = {"stdin": inode(file), "stdout": inode(fifo), "stderr": inode(file)}
        assert process.reopen_pipes(pid, known) == {}
    os.close(fifo)
    os.close(file)
