"""Cgroups of the running kernel: one run for each form that it can be used as.

A hybrid also serves as plain v1, by leaving its cgroup2 alone. All groups are below ``/na-test-PID``.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nodeagent.cgroups import hierarchy, tree
from nodeagent.cgroups.descriptors import WatchFds
from nodeagent.cgroups.group import Cgroup
from nodeagent.cgroups.hierarchy import Layout
from nodeagent.cgroups.manager import Cgroups
from nodeagent.linux import mountinfo
from nodeagent.requests import Resources
from tests.support.node import wait_for

ROOT = "/sys/fs/cgroup"
TOP = f"/na-test-{os.getpid()}"
LAYOUT = hierarchy.detect(ROOT, mountinfo.parse(mountinfo.table()))

_LAYOUTS = {"v2": LAYOUT}
if LAYOUT.legacy:
    _LAYOUTS = {"v1": replace(LAYOUT, unified=None)}
    if LAYOUT.unified:
        _LAYOUTS["hybrid"] = LAYOUT

Spawn = Callable[[Cgroup, str], subprocess.Popen[bytes]]


@pytest.fixture(params=sorted(_LAYOUTS))
def layout(request: pytest.FixtureRequest) -> Iterator[Layout]:
    """Whatever a test leaves below TOP is a failure, and removed."""
    layout = _LAYOUTS[request.param]
    yield layout
    left = [h for h in LAYOUT.hierarchies if os.path.isdir(h.directory(TOP))]
    for h in left:
        for parent, name in tree.bottom_up(h.directory(TOP)):
            os.rmdir(name, dir_fd=parent)
    assert not left, f"{TOP} is left in {left}"


@pytest.fixture
def cgroups(layout: Layout) -> Cgroups:
    return Cgroups(layout, driver="cgroupfs", default_parent=f"{TOP}/default")


@pytest.fixture
def group(cgroups: Cgroups) -> Iterator[Cgroup]:
    """A group without limits; what is in it is killed at the end."""
    group = cgroups.create(f"{TOP}/group")
    yield group
    if group.exists():
        group.kill()
    group.remove()


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Runs Python code in a group; the process says "ready" on its standard output where the code prints it."""
    started: list[subprocess.Popen[bytes]] = []

    def run(group: Cgroup, code: str) -> subprocess.Popen[bytes]:
        fds = group.join_fds()
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", join(fds) + code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=fds,
            )
        finally:
            for fd in fds:
                os.close(fd)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def join(fds: list[int]) -> str:
    """Code with which a process joins; a supervisor's child has CLONE_INTO_CGROUP for the directory."""
    return f"""
import os, stat
for fd in {fds}:
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        fd = os.open('cgroup.procs', os.O_WRONLY, dir_fd=fd)
    os.write(fd, b'0')
"""


def in_force(group: Cgroup) -> Resources:
    """The limits that the kernel enforces, in the CRI's units; without those of huge pages."""
    return group._version.resources(group._files)


def freeze(group: Cgroup) -> None:
    """Stop all processes, as anybody may who can write to the group's files."""
    directory = Path(group._tracking.directory(group.path))
    if (directory / "cgroup.freeze").exists():
        (directory / "cgroup.freeze").write_text("1")
        wait_for("frozen", lambda: "frozen 1" in (directory / "cgroup.events").read_text())
        return

    def is_frozen() -> bool:
        """A process that forks meanwhile delays the rest until FROZEN is written again."""
        (directory / "freezer.state").write_text("FROZEN")
        return (directory / "freezer.state").read_text() == "FROZEN\n"

    wait_for("frozen", is_frozen)


def close(watch: WatchFds) -> None:
    for fd in (watch.oom, watch.procs, watch.kill):
        if fd is not None:
            os.close(fd)
