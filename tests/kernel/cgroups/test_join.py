"""Joining as a supervisor's child does it: born in the cgroup2 directory, the v1 hierarchies by writes of its own."""

import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent.cgroups.group import Cgroup
from nodeagent.cgroups.manager import Cgroups
from nodeagent.linux import syscalls


@pytest.fixture
def group() -> Iterator[Cgroup]:
    cgroups = Cgroups.open(driver="cgroupfs", default_parent=f"/na-test-{os.getpid()}-join")
    group = cgroups.create(cgroups.container_path("", "container"))
    yield group
    group.kill()
    group.remove()


def start(group: Cgroup) -> int:
    """A process in the group that waits for its end."""
    fds = group.join_fds()
    directories = [fd for fd in fds if stat.S_ISDIR(os.fstat(fd).st_mode)]
    try:
        pid, pidfd = syscalls.clone3(cgroup=directories[0] if directories else -1)
        if pid == 0:
            _join_and_wait([fd for fd in fds if fd not in directories])
        os.close(pidfd)
    finally:
        for fd in fds:
            os.close(fd)
    return pid


def _join_and_wait(tasks: list[int]) -> None:
    for file in tasks:
        os.write(file, b"0")
    os.kill(os.getpid(), signal.SIGSTOP)
    os._exit(0)


def test_a_child_is_in_every_hierarchy(group: Cgroup) -> None:
    pid = start(group)
    os.waitpid(pid, os.WUNTRACED)
    lines = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8").splitlines()
    paths = [line.split(":", 2)[2] for line in lines]
    assert paths == [group.path] * len(paths)
    assert group.processes() == [pid]
    group.kill()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
