"""The check for leaks finds what a run can leave, and nothing when there is nothing."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import leaks


@pytest.fixture
def machine(tmp_path: Path) -> leaks.Machine:
    return leaks.Machine(os.environ[leaks.VARIABLE], tmp_path)


@pytest.fixture
def orphan() -> Iterator[int]:
    """A process whose parent is gone."""
    pid = without_parent(os.environ[leaks.VARIABLE])
    yield pid
    os.kill(pid, signal.SIGKILL)


def without_parent(run: str) -> int:
    """A process of this run."""
    started = subprocess.run(
        ["sh", "-c", "sleep 60 >/dev/null 2>&1 & echo $!"],
        env={**os.environ, leaks.VARIABLE: run},
        capture_output=True,
        check=True,
    )
    return int(started.stdout)


def test_a_stranger_who_leaves_makes_nothing_new(tmp_path: Path) -> None:
    stranger = without_parent("somebody else's")
    machine = leaks.Machine(os.environ[leaks.VARIABLE], tmp_path)
    os.kill(stranger, signal.SIGKILL)
    assert machine.left(patience=1) == []


def test_nothing_is_left_of_nothing(machine: leaks.Machine) -> None:
    assert machine.left() == []


def test_finds_a_process_without_parent(machine: leaks.Machine, orphan: int) -> None:
    assert machine.left(patience=0.1) == [f"process {orphan}: sleep 60"]


def test_finds_a_mount(machine: leaks.Machine, tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "none", tmp_path], check=True)
    try:
        (line,) = machine.left(patience=0.1)
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert line.startswith("mount ")
    assert str(tmp_path) in line


def test_finds_a_namespace_that_is_held_open(machine: leaks.Machine) -> None:
    with open("/proc/self/ns/net", "rb") as namespace:
        (line,) = machine.left(patience=0.1)
        assert line.startswith(f"descriptor {namespace.fileno()} of net:[")
