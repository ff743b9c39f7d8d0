"""Transactions on files of a plain directory; what only the kernel refuses is tested in tests/contract/cgroups."""

import resource
from pathlib import Path

import pytest

from nodeagent.cgroups.control import ControlFiles, reverse
from nodeagent.errors import NotFound, Unsupported


def test_write(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1111\n")
    (tmp_path / "pids.max").write_text("2222\n")
    ControlFiles({"": str(tmp_path)}).write([("memory.max", "3333"), ("pids.max", "4444")])
    assert (tmp_path / "memory.max").read_text() == "3333\n"
    assert (tmp_path / "pids.max").read_text() == "4444\n"


def test_a_missing_file_undoes_the_writes_before_it(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1111\n")
    with pytest.raises(Unsupported, match=r'cpu\.max: cannot write "1 2"'):
        ControlFiles({"": str(tmp_path)}).write([("memory.max", "3333"), ("cpu.max", "1 2")])
    assert (tmp_path / "memory.max").read_text() == "1111\n"


def test_a_missing_controller(tmp_path: Path) -> None:
    files = ControlFiles({"memory": str(tmp_path)})
    assert files.read("cpu.shares", "absent") == "absent"
    assert files.sample("cpu.shares") is None
    assert not files.has("cpu.shares")
    with pytest.raises(Unsupported, match=r'cpu\.shares: "2" needs a controller'):
        files.write([("cpu.shares", "2")])


def test_a_group_that_has_gone(tmp_path: Path) -> None:
    files = ControlFiles({"": str(tmp_path / "gone")})
    with pytest.raises(NotFound, match="gone"):
        files.read("cpu.max")
    with pytest.raises(NotFound, match="gone"):
        files.write([("cpu.max", "1")])


def test_a_device_line_is_set_back_by_its_device() -> None:

    old = "8:0 rbps=1 wbps=max riops=max wiops=max\n"
    assert reverse("io.max", "8:0 rbps=2", old) == old.strip()
    assert reverse("io.max", "8:16 rbps=2", old) == "8:16 rbps=max wbps=max riops=max wiops=max"
    assert reverse("io.weight", "200", "default 100\n8:0 50\n") == "default 100"
    assert reverse("io.weight", "8:16 7", "default 100\n") == "8:16 default"
    assert reverse("memory.max", "1", "max\n") == "max"


def test_an_empty_list_is_set_back_by_a_write_that_is_not_empty() -> None:
    assert reverse("cpuset.cpus", "0", "\n") == "\n"


def test_a_file_that_could_not_be_opened_once_can_be_read_later(tmp_path: Path) -> None:
    (tmp_path / "memory.stat").write_bytes(b"anon 1\n")
    files = ControlFiles({"": str(tmp_path)})
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        assert files.sample("memory.stat") is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert files.sample("memory.stat") == b"anon 1\n"
    files.close()


def test_samples_are_fresh_and_of_any_length(tmp_path: Path) -> None:
    file = tmp_path / "memory.stat"
    file.write_bytes(b"anon 1\n")
    files = ControlFiles({"": str(tmp_path)})
    assert files.sample("memory.stat") == b"anon 1\n"
    file.write_bytes(b"anon 22\n" * 10_000)
    assert files.sample("memory.stat") == b"anon 22\n" * 10_000
    files.close()
    assert files.sample("memory.stat") == b"anon 22\n" * 10_000
    files.close()
