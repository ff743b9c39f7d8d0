"""Joining, watching, killing and freezing; groups of execs."""

import os
import stat
import subprocess
import time

import pytest

from nodeagent.cgroups.group import Cgroup
from nodeagent.cgroups.hierarchy import Layout
from nodeagent.cgroups.manager import Cgroups
from nodeagent.errors import AlreadyExists, InvalidArgument, NotFound, Unsupported
from nodeagent.requests import Resources
from tests.contract.cgroups.conftest import Spawn, close, freeze, in_force

WAIT = "print('ready', flush=True); input()"
BUSY = "print('ready', flush=True)\nwhile True: pass"
FORKS = """
import os
print('ready', flush=True)
while True:
    if not os.fork(): os._exit(0) if os.fork() else None
    try: os.waitpid(-1, os.WNOHANG)
    except ChildProcessError: pass
"""


def ready(process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    assert process.stdout
    assert process.stdout.readline() == b"ready\n"
    return process


def groups_of(pid: int) -> dict[str, str]:
    """Path of a process in each hierarchy, by its controllers."""
    with open(f"/proc/{pid}/cgroup", encoding="utf-8") as file:
        fields = [line.rstrip("\n").split(":", 2) for line in file]
    return {controllers: path for _, controllers, path in fields}


def eventually_empty(group: Cgroup) -> bool:
    deadline = time.monotonic() + 5
    while group.populated() and time.monotonic() < deadline:
        time.sleep(0.005)
    return not group.populated()


def test_join_enters_every_hierarchy(group: Cgroup, layout: Layout, spawn: Spawn) -> None:
    assert not group.populated()
    process = ready(spawn(group, WAIT))
    inside = [path for path in groups_of(process.pid).values() if path == group.path]
    assert len(inside) == len(layout.hierarchies)
    assert group.processes() == [process.pid]
    assert group.populated()


def test_join_fds(group: Cgroup, layout: Layout) -> None:
    fds = group.join_fds()
    try:
        kinds = [stat.S_ISDIR(os.fstat(fd).st_mode) for fd in fds]
        assert kinds == [True] * bool(layout.unified) + [False] * len(layout.legacy)
        assert not any(os.get_inheritable(fd) for fd in fds)
    finally:
        for fd in fds:
            os.close(fd)


def test_watch(group: Cgroup, layout: Layout, spawn: Spawn) -> None:
    watch = group.watch_fds()
    try:
        process = ready(spawn(group, WAIT))
        assert os.pread(watch.procs, 4096, 0) == b"%d\n" % process.pid
        assert (watch.kill is None) == (layout.unified is None)
        if watch.kill is not None:
            os.write(watch.kill, b"1")
            assert process.wait(5) == -9
    finally:
        close(watch)


@pytest.mark.parametrize("code", [WAIT, BUSY, FORKS], ids=["wait", "busy", "forks"])
def test_kill(group: Cgroup, spawn: Spawn, code: str) -> None:
    group.apply(Resources(pids_limit=50))
    first, second = ready(spawn(group, WAIT)), ready(spawn(group, code))
    group.kill()
    assert (first.wait(5), second.wait(5)) == (-9, -9)
    assert eventually_empty(group)
    assert group.processes() == []


def test_kill_reaches_groups_below(group: Cgroup, spawn: Spawn) -> None:
    inner = group.child("inner")
    process = ready(spawn(inner, WAIT))
    assert group.processes() == [process.pid]
    assert group.populated()
    group.kill()
    assert process.wait(5) == -9


def test_kill_of_a_group_without_processes(group: Cgroup) -> None:
    group.kill()
    group.remove()
    group.kill()
    assert group.processes() == []
    assert not group.populated()


def test_freeze_and_thaw(group: Cgroup, spawn: Spawn) -> None:
    process = ready(spawn(group, BUSY))
    freeze(group)
    before = cpu_usage(group)
    time.sleep(0.05)
    assert cpu_usage(group) - before < 5_000_000
    group.thaw()
    deadline = time.monotonic() + 5
    while cpu_usage(group) - before < 10_000_000:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert process.poll() is None


def test_the_frozen_can_be_killed(group: Cgroup, spawn: Spawn) -> None:
    process = ready(spawn(group, BUSY))
    freeze(group)
    group.kill()
    assert process.wait(5) == -9


def cpu_usage(group: Cgroup) -> int:
    cpu = group.stats().cpu
    assert cpu
    return cpu.usage_ns


# --- execs ---


def test_an_exec_counts_for_its_container(group: Cgroup, spawn: Spawn) -> None:
    group.apply(Resources(pids_limit=2))
    container = ready(spawn(group, WAIT))
    exec_group = group.child("exec-1")
    process = ready(spawn(exec_group, WAIT))
    pids = group.stats().pids
    assert pids
    assert (pids.current, pids.limit) == (2, 2)
    assert group.processes() == sorted([container.pid, process.pid])
    assert exec_group.processes() == [process.pid]
    refused = spawn(exec_group, "print('never')")
    assert refused.wait(5) != 0 or refused.communicate()[0] == b"never\n"


def test_an_exec_is_killed_alone(group: Cgroup, spawn: Spawn) -> None:
    container = ready(spawn(group, WAIT))
    exec_group = group.child("exec-1")
    process = ready(spawn(exec_group, f"import os; os.fork()\n{WAIT}"))
    exec_group.kill()
    assert process.wait(5) == -9
    exec_group.remove()
    assert container.poll() is None
    assert group.processes() == [container.pid]
    exec_group.remove()


def test_what_an_exec_leaves_is_removed_with_a_later_one(group: Cgroup, spawn: Spawn) -> None:
    left, ended = group.child("exec-1"), group.child("exec-2")
    process = ready(spawn(left, WAIT))
    group.discard(left)
    assert left.processes() == [process.pid]
    process.kill()
    process.wait()
    group.discard(ended)
    assert not left.exists()
    assert not ended.exists()


def test_what_an_agent_before_has_left_is_removed_with_a_later_one(
    cgroups: Cgroups, group: Cgroup, spawn: Spawn
) -> None:
    """Each restart beside a probe left a group, as long as its container ran."""
    runs, ended = group.child("exec-runs"), group.child("exec-ended")
    process = ready(spawn(runs, WAIT))
    again = cgroups.open_existing(group.path)
    again.take_over_execs()
    again.discard(again.child("exec-new"))
    assert (runs.exists(), ended.exists()) == (True, False)
    process.kill()
    process.wait()
    again.discard(again.child("exec-newer"))
    assert not runs.exists()


def test_an_exec_is_watched_and_has_no_limits(group: Cgroup, layout: Layout, spawn: Spawn) -> None:
    group.apply(Resources(pids_limit=5))
    exec_group = group.child("exec-1")
    process = ready(spawn(exec_group, WAIT))
    watch = exec_group.watch_fds()
    try:
        assert watch.oom is None
        assert os.pread(watch.procs, 4096, 0) == b"%d\n" % process.pid
        assert (watch.kill is None) == (layout.unified is None)
    finally:
        close(watch)
    with pytest.raises(Unsupported):
        exec_group.apply(Resources(pids_limit=1))
    assert in_force(group).pids_limit == 5
    assert exec_group.stats().pids is None


def test_names_of_execs(group: Cgroup) -> None:
    group.child("exec-1")
    with pytest.raises(AlreadyExists):
        group.child("exec-1")
    for name in ("", "..", "a/b", "a\n"):
        with pytest.raises(InvalidArgument):
            group.child(name)


def test_a_group_that_has_gone(group: Cgroup) -> None:
    group.remove()
    with pytest.raises(NotFound):
        group.join_fds()
    with pytest.raises(NotFound):
        group.watch_fds()
    with pytest.raises(NotFound):
        group.child("exec-1")
