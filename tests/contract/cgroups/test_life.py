"""Making, finding and removing groups."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from nodeagent.cgroups import tree
from nodeagent.cgroups.group import Cgroup
from nodeagent.cgroups.hierarchy import Layout
from nodeagent.cgroups.manager import Cgroups
from nodeagent.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unsupported,
)
from nodeagent.requests import Resources
from tests.contract.cgroups.conftest import LAYOUT, ROOT, TOP, Spawn, freeze, in_force


def directories(layout: Layout, path: str) -> list[str]:
    return [h.directory(path) for h in layout.hierarchies if os.path.isdir(h.directory(path))]


@contextmanager
def foreign(layout: Layout, path: str) -> Iterator[None]:
    """A group of somebody else, in all hierarchies."""
    for hierarchy in layout.hierarchies:
        os.mkdir(hierarchy.directory(path))
    try:
        yield
    finally:
        for hierarchy in layout.hierarchies:
            os.rmdir(hierarchy.directory(path))


def test_the_machine_is_understood() -> None:
    cgroups = Cgroups.open(driver="cgroupfs", default_parent="/x")
    assert cgroups.hierarchy == LAYOUT.kind
    assert {"cpu", "memory", "pids"} <= cgroups.controllers
    assert cgroups.mounts()
    with pytest.raises(Unsupported, match="/nowhere"):
        Cgroups.open(driver="cgroupfs", default_parent="/x", root="/nowhere")


def test_a_container_goes_below_its_parent(cgroups: Cgroups) -> None:
    inner = "/container" if cgroups.hierarchy == "v2" else ""
    assert cgroups.container_path("/kubepods/pod1", "abc") == f"/kubepods/pod1/abc{inner}"
    assert cgroups.container_path("", "abc") == f"{TOP}/default/abc{inner}"
    with pytest.raises(InvalidArgument):
        cgroups.container_path("/a/../..", "abc")


def test_made_and_removed_with_its_parents(cgroups: Cgroups, layout: Layout) -> None:
    group = cgroups.create(f"{TOP}/a/b/c")
    assert len(directories(layout, f"{TOP}/a/b/c")) == len(layout.hierarchies)
    group.remove()
    assert directories(layout, TOP) == []
    group.remove()


def test_parents_stay_while_they_are_needed(cgroups: Cgroups, layout: Layout) -> None:
    first, second = cgroups.create(f"{TOP}/a/one"), cgroups.create(f"{TOP}/a/two")
    first.remove()
    assert second.exists()
    second.remove()
    assert directories(layout, TOP) == []


def test_parents_go_although_others_removed_what_is_between(
    cgroups: Cgroups, layout: Layout
) -> None:
    group = cgroups.create(f"{TOP}/a/b/c")
    for hierarchy in layout.hierarchies:
        os.rmdir(hierarchy.directory(f"{TOP}/a/b/c"))
        os.rmdir(hierarchy.directory(f"{TOP}/a/b"))
    group.remove()
    assert directories(layout, TOP) == []


def test_parents_are_shared_by_threads(cgroups: Cgroups, layout: Layout) -> None:
    def churn(name: int) -> None:
        for _ in range(30):
            cgroups.create(f"{TOP}/a/b/{name}").remove()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(churn, range(4)))
    assert directories(layout, TOP) == []


def nested(directory: str, levels: int, name: str) -> int:
    """The innermost of groups within one another, open; their path is longer than any system call takes."""
    here = os.open(directory, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir(name, dir_fd=here)
        inside = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inside
    return here


def test_groups_nested_deeper_than_paths_are_long(
    cgroups: Cgroups, group: Cgroup, layout: Layout, spawn: Spawn
) -> None:
    """A container that mounts its cgroups can make them: it is killed and removed as any other."""
    process = spawn(group, "print('ready', flush=True); input()")
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    for hierarchy in layout.hierarchies:
        innermost = nested(hierarchy.directory(group.path), 25, "x" * 200)
        if hierarchy is layout.hierarchies[0]:  # a new group of cpuset has no processor yet
            file = os.open("cgroup.procs", os.O_WRONLY, dir_fd=innermost)
            os.write(file, str(process.pid).encode())
            os.close(file)
        os.close(innermost)
    assert group.processes() == [process.pid]
    assert group.populated()
    with pytest.raises(FailedPrecondition, match=r"not removed, processes [0-9]+ are in x+$"):
        group.remove(timeout_s=0)
    group.kill()
    process.wait(10)
    assert not group.populated()
    group.remove()
    assert directories(layout, group.path) == []


def test_parents_of_others_stay(cgroups: Cgroups, layout: Layout) -> None:
    with foreign(layout, TOP):
        group = cgroups.create(f"{TOP}/group")
        group.remove()
        assert len(directories(layout, TOP)) == len(layout.hierarchies)


def test_groups_of_others_are_never_touched(cgroups: Cgroups, layout: Layout) -> None:
    with foreign(layout, TOP):
        group = cgroups.open_existing(TOP)
        for forbidden in (group.remove, group.kill, group.thaw, lambda: group.set_devices(None)):
            with pytest.raises(FailedPrecondition, match="not made by this agent"):
                forbidden()
        assert len(directories(layout, TOP)) == len(layout.hierarchies)


def test_a_mark_that_its_container_took_away(cgroups: Cgroups, layout: Layout) -> None:
    """On v2, where SYS_ADMIN and a writable group are not the node's root: the group above has one as well."""
    if layout.legacy:
        pytest.skip("a container that may write to groups is privileged on v1")
    group = cgroups.create(cgroups.container_path(TOP, "id"))
    exec_ = group.child("exec")
    for path in (group.path, exec_.path):
        os.removexattr(layout.hierarchies[0].directory(path), tree.MARK)
    for owned in (exec_, group):
        owned.kill()
        freeze(owned)
        owned.thaw()
        owned.remove()
    assert directories(layout, group.path) == []


def test_nor_are_parents_that_were_made(cgroups: Cgroups) -> None:
    group = cgroups.create(f"{TOP}/shared/group")
    shared = cgroups.open_existing(f"{TOP}/shared")
    with pytest.raises(FailedPrecondition, match="not made by this agent"):
        shared.kill()
    with pytest.raises(FailedPrecondition, match="not made by this agent"):
        shared.remove()
    group.remove()


@pytest.mark.parametrize("path", ["/", "", "relative", f"{TOP}/.."])
def test_the_root_is_out_of_reach(cgroups: Cgroups, path: str) -> None:
    with pytest.raises(InvalidArgument):
        cgroups.create(path)
    with pytest.raises(InvalidArgument):
        cgroups.open_existing(path)


def test_a_taken_path(cgroups: Cgroups, group: Cgroup) -> None:
    with pytest.raises(AlreadyExists, match="group"):
        cgroups.create(group.path)
    assert group.exists()


def test_a_taken_path_in_the_last_hierarchy_undoes_the_others(
    cgroups: Cgroups, layout: Layout
) -> None:
    last = layout.hierarchies[-1].directory(TOP)
    os.mkdir(last)
    try:
        with pytest.raises(AlreadyExists):
            cgroups.create(TOP)
        assert directories(layout, TOP) == [last]
    finally:
        os.rmdir(last)


@pytest.mark.parametrize("below", ["", "/a", "/a/b"])
def test_a_control_file_is_no_parent(cgroups: Cgroups, below: str) -> None:
    with pytest.raises(InvalidArgument, match="control file"):
        cgroups.create(f"/cgroup.procs{below}/group")


@pytest.mark.parametrize(
    ("resources", "error"),
    [
        (Resources(memory_limit_bytes=2, memory_swap_limit_bytes=1), InvalidArgument),
        (Resources(memory_limit_bytes=64 << 20, hugepage_limits={"3MB": 1}), Unsupported),
    ],
)
def test_limits_that_fail_leave_nothing(
    cgroups: Cgroups, layout: Layout, resources: Resources, error: type[Exception]
) -> None:
    with pytest.raises(error):
        cgroups.create(f"{TOP}/a/group", resources)
    assert directories(layout, TOP) == []


def test_found_again_after_a_restart(cgroups: Cgroups, layout: Layout) -> None:
    cgroups.create(f"{TOP}/a/group", Resources(pids_limit=7))
    later = Cgroups(layout, driver="cgroupfs", default_parent="/x")
    group = later.open_existing(f"{TOP}/a/group")
    assert in_force(group).pids_limit == 7
    group.remove()
    assert directories(layout, TOP) == []
    with pytest.raises(NotFound, match="group"):
        later.open_existing(f"{TOP}/a/group")


def test_the_agents_own_group(cgroups: Cgroups, layout: Layout) -> None:
    group = cgroups.instance_group()
    assert group.path == f"{cgroups.default_parent}/agent"
    assert cgroups.instance_group().exists()
    cgroups.remove_instance()
    assert directories(layout, TOP) == []
    cgroups.remove_instance()


def test_groups_that_a_container_made_are_removed(group: Cgroup, layout: Layout) -> None:
    for hierarchy in layout.hierarchies:
        os.makedirs(hierarchy.directory(f"{group.path}/inner/most"))
    group.remove()
    assert directories(layout, group.path) == []


def test_a_group_with_processes_stays(group: Cgroup, spawn: Spawn) -> None:
    process = spawn(group, "print('ready', flush=True); input()")
    assert process.stdout
    process.stdout.readline()
    with pytest.raises(FailedPrecondition, match=str(process.pid)):
        group.remove(timeout_s=0)
    assert group.exists()
    assert process.poll() is None


def test_removal_waits_for_the_killed(group: Cgroup, spawn: Spawn) -> None:
    for _ in range(5):
        process = spawn(group, "x = bytearray(20 << 20); print('ready', flush=True); input()")
        assert process.stdout
        process.stdout.readline()
    group.kill()
    group.remove()
    assert not group.exists()


def test_a_group_partly_removed_by_others(cgroups: Cgroups, layout: Layout) -> None:
    """A kubelet does so at the end of a pod, and may know fewer hierarchies."""
    group = cgroups.create(f"{TOP}/pod/group")
    os.rmdir(layout.hierarchies[0].directory(group.path))
    group.remove()
    assert directories(layout, TOP) == []


@pytest.mark.parametrize("marked", range(3))
def test_what_a_killed_agent_has_made_halfway_is_removed(
    cgroups: Cgroups, layout: Layout, marked: int
) -> None:
    """It dies between making a group and marking it: the first parent, the second, or the group itself."""
    path = f"{TOP}/pod/group"
    code = f"""
import itertools, os, sys
from nodeagent.cgroups import tree
count, mark = itertools.count(), os.setxattr
os.setxattr = lambda *arguments: os._exit(9) if next(count) == {marked} else mark(*arguments)
tree.make(sys.argv[1], sys.argv[2])
"""
    for hierarchy in layout.hierarchies:
        child = subprocess.run([sys.executable, "-c", code, hierarchy.mount, path], check=False)
        assert child.returncode == 9
        assert tree.kind(hierarchy.directory((TOP, f"{TOP}/pod", path)[marked])) == tree.UNFINISHED
    cgroups.end(path)
    assert directories(layout, TOP) == []


def test_marks_survive_in_the_kernel(cgroups: Cgroups, layout: Layout) -> None:
    group = cgroups.create(f"{TOP}/pod/group")
    for hierarchy in layout.hierarchies:
        assert tree.kind(hierarchy.directory(group.path)) == tree.GROUP
        assert tree.kind(hierarchy.directory(TOP)) == tree.PARENT
    assert tree.kind(ROOT) is None
    group.remove()


def test_a_group_that_was_made_in_part_ends(cgroups: Cgroups, layout: Layout) -> None:
    """An agent was killed while it made it: it has no mark yet, and is in one of the hierarchies."""
    path = cgroups.container_path(f"{TOP}/pod", "abc")
    for hierarchy in layout.hierarchies:
        tree.make(hierarchy.mount, path)
        os.removexattr(hierarchy.directory(path), tree.MARK)
        os.chmod(hierarchy.directory(path), 0o1700)
        cgroups.end(path)
        assert directories(layout, TOP) == []


def test_what_runs_in_a_group_ends_with_it(cgroups: Cgroups, spawn: Spawn) -> None:
    group = cgroups.create(cgroups.container_path(f"{TOP}/pod", "abc"))
    process = spawn(group, "print('ready', flush=True); input()")
    assert process.stdout
    process.stdout.readline()
    cgroups.end(group.path)
    assert process.wait(60) == -signal.SIGKILL
    assert not group.exists()
    cgroups.end(group.path)


def test_groups_of_pods_without_a_parent_are_found_by_their_ids(
    cgroups: Cgroups, layout: Layout
) -> None:
    pod, container, other = "a" * 64, "b" * 64, "c" * 64
    parent = cgroups.pod_path(pod)
    group = cgroups.create(cgroups.container_path(parent, container))
    exec_group = group.child("exec")
    with foreign(layout, f"{parent}/{other}"):
        assert cgroups.of_pods_without_parent() == {
            cgroups.container_path(parent, container): container
        }
    group.discard(exec_group)
    cgroups.end(cgroups.container_path(parent, container))
    assert cgroups.of_pods_without_parent() == {}
    assert directories(layout, TOP) == []
