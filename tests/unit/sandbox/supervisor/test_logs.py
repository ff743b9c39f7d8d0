"""The log's format, whatever the borders at which output arrives; the file, whatever happens to it."""

import os
import re
import stat
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.errors import FailedPrecondition
from nodeagent.sandbox.supervisor.logs import (
    MAX_LINE_BYTES,
    Clock,
    LogFile,
    format_end,
    format_lines,
)

STAMP = b"2026-11-23T16:05:00.123456789Z"
LINE = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z (stdout|stderr) ([PF]) (.*)\n")

LENGTHS = st.integers(0, 3 * MAX_LINE_BYTES + 2) | st.integers(0, 20)
OUTPUTS = st.lists(LENGTHS, max_size=5).map(lambda sizes: b"\n".join(b"x" * n for n in sizes))


def write(chunks: list[bytes]) -> bytes:
    """What the log gets, to the end."""
    output, rest = b"", b""
    for chunk in chunks:
        lines, rest = format_lines(rest + chunk, STAMP, b"stdout")
        output += lines
    return output + format_end(rest, STAMP, b"stdout")


def read(log: bytes) -> list[bytes]:
    """The lines, their parts joined, as the kubelet does it; the last one may have no newline."""
    lines, parts = [], b""
    for line in log.splitlines(keepends=True):
        match = LINE.fullmatch(line)
        assert match is not None, line
        parts += match[3]
        if match[2] == b"F":
            lines.append(parts)
            parts = b""
    return [*lines, parts] if parts else lines


def split_at(data: bytes, borders: list[int]) -> list[bytes]:
    places = [0, *sorted(border % (len(data) + 1) for border in borders), len(data)]
    return [data[start:end] for start, end in pairwise(places)]


def test_the_format() -> None:
    lines, rest = format_lines(b"first\nsecond\nthi", STAMP, b"stderr")
    assert lines == STAMP + b" stderr F first\n" + STAMP + b" stderr F second\n"
    assert rest == b"thi"


def test_nothing_is_written_of_nothing() -> None:
    assert format_lines(b"", STAMP, b"stdout") == (b"", b"")
    assert format_end(b"", STAMP, b"stdout") == b""


def test_an_empty_line_is_a_line() -> None:
    assert read(write([b"\n\n"])) == [b"", b""]


def test_a_carriage_return_is_content() -> None:
    assert read(write([b"x\r\n"])) == [b"x\r"]


@pytest.mark.parametrize(
    ("length", "tags"),
    [
        (MAX_LINE_BYTES, [b"F"]),
        (MAX_LINE_BYTES + 1, [b"P", b"F"]),
        (2 * MAX_LINE_BYTES, [b"P", b"F"]),
        (2 * MAX_LINE_BYTES + 1, [b"P", b"P", b"F"]),
    ],
)
def test_long_lines_are_cut(length: int, tags: list[bytes]) -> None:
    log = write([b"x" * length + b"\n"])
    assert [match[2] for match in LINE.finditer(log)] == tags
    assert read(log) == [b"x" * length]


@pytest.mark.parametrize("length", [1, MAX_LINE_BYTES, MAX_LINE_BYTES + 1])
def test_an_end_without_newline_is_a_part(length: int) -> None:
    """A Conformance spec wants back what `echo -n DONE` has written, without a newline."""
    log = write([b"first\n" + b"x" * length])
    first, *parts = [match[2] for match in LINE.finditer(log)]
    assert (first, set(parts)) == (b"F", {b"P"})
    assert read(log) == [b"first", b"x" * length]


@given(OUTPUTS, st.lists(st.integers(0, 1 << 20), max_size=5))
def test_borders_of_reads_do_not_matter(output: bytes, borders: list[int]) -> None:
    log = write(split_at(output, borders))
    expected = output.split(b"\n")
    if expected[-1] == b"":
        del expected[-1]
    assert read(log) == expected


@given(OUTPUTS, st.lists(st.integers(0, 1 << 20), max_size=5))
def test_what_is_held_back_is_bounded(output: bytes, borders: list[int]) -> None:
    rest = b""
    for chunk in split_at(output, borders):
        _, rest = format_lines(rest + chunk, STAMP, b"stdout")
        assert len(rest) <= MAX_LINE_BYTES


def test_stamps_never_run_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1_000_000_000_000_000_123, 999_999_999_000_000_000, 1_000_000_000_000_000_124])
    monkeypatch.setattr(time, "time_ns", lambda: next(times))
    clock = Clock()
    assert [clock.stamp() for _ in range(3)] == [
        b"2001-09-09T01:46:40.000000123Z",
        b"2001-09-09T01:46:40.000000123Z",
        b"2001-09-09T01:46:40.000000124Z",
    ]


# ---- the file ----


def test_the_file_is_there_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "pod" / "container" / "0.log"
    LogFile(str(path)).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755
    assert path.read_bytes() == b""


def test_it_goes_on_where_it_was(tmp_path: Path) -> None:
    for line in (b"one\n", b"two\n"):
        log = LogFile(str(tmp_path / "log"))
        log.write(line)
        log.close()
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\n"


def test_after_reopening_nothing_goes_to_the_old_file(tmp_path: Path) -> None:
    path, rotated = tmp_path / "log", tmp_path / "log.1"
    log = LogFile(str(path))
    log.write(b"old\n")
    path.rename(rotated)
    log.write(b"still old\n")
    log.reopen()
    assert path.read_bytes() == b""
    log.write(b"new\n")
    log.close()
    assert (path.read_bytes(), rotated.read_bytes()) == (b"new\n", b"old\nstill old\n")


def test_a_reopening_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = LogFile(str(path))
    path.rename(tmp_path / "log.1")
    path.mkdir()
    with pytest.raises(FailedPrecondition, match="log: Is a directory"):
        log.reopen()
    log.write(b"line\n")
    log.close()
    assert (tmp_path / "log.1").read_bytes() == b"line\n"


def test_links_and_pipes_of_a_container_are_refused(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FailedPrecondition, match="link"):
        LogFile(str(tmp_path / "link"))
    with pytest.raises(FailedPrecondition, match="pipe"):
        LogFile(str(tmp_path / "pipe"))


@pytest.mark.parametrize("how", ["open", "reopen"])
def test_a_file_that_has_another_name_is_left_to_that(tmp_path: Path, how: str) -> None:
    """Or who may make links in the directory could have root write to a file of somebody else's."""
    path, other = tmp_path / "log", tmp_path / "other"
    log = LogFile(str(path))
    log.write(b"first\n")
    if how == "open":
        log.close()
    path.rename(tmp_path / "log.1")
    other.write_bytes(b"other\n")
    path.hardlink_to(other)
    if how == "open":
        log = LogFile(str(path))
    else:
        log.reopen()
    log.write(b"second\n")
    log.close()
    assert other.read_bytes() == b"other\n"
    assert path.read_bytes() == b"second\n"
    assert (tmp_path / "log.1").read_bytes() == b"first\n"


def test_links_below_the_directory_of_the_pod_are_refused(tmp_path: Path) -> None:
    """Above it they are the node's own."""
    pod, outside = tmp_path / "logs" / "pod", tmp_path / "outside"
    pod.mkdir(parents=True)
    outside.mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "logs")
    root = str(tmp_path / "linked" / "pod")
    LogFile(f"{root}/main/0.log", root).close()
    assert (pod / "main" / "0.log").exists()
    (pod / "other").symlink_to(outside)
    with pytest.raises(FailedPrecondition, match=r"other/0\.log: Too many levels"):
        LogFile(f"{root}/other/0.log", root)
    assert os.listdir(outside) == []


def test_what_a_full_disk_refuses_is_dropped_and_no_line_is_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    log = LogFile(str(path))
    log.write(b"whole\n")
    monkeypatch.setattr(os, "write", FullDisk(9))
    log.write(b"fits\ndoes not\nnor this\n")
    monkeypatch.undo()
    log.write(b"after\n")
    log.close()
    assert path.read_bytes() == b"whole\nfits\nafter\n"
    assert log.dropped_lines == 2


class FullDisk:
    """os.write where so many bytes are free."""

    def __init__(self, free: int) -> None:
        self.free = free
        self.write = os.write

    def __call__(self, descriptor: int, data: bytes) -> int:
        if not self.free:
            raise OSError(28, "No space left on device")
        written = self.write(descriptor, data[: self.free])
        self.free -= written
        return written
