"""Descriptors through which another process joins a group or watches over it, without knowing its path."""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from nodeagent.cgroups.hierarchy import Hierarchy, Layout
from nodeagent.errors import NotFound


@dataclass(frozen=True, slots=True)
class JoinFds:
    """How a process gets into a group; the descriptors belong to the holder.

    directory: of cgroup2, for CLONE_INTO_CGROUP. tasks: of v1 hierarchies, opened for writing: a process of a single
    thread writes "0" to each. (To `tasks` and with 0 a move needs no system-wide lock; `cgroup.procs` takes one and
    waits for an RCU grace period.) On a hybrid there are both.
    """

    directory: int | None
    tasks: tuple[int, ...]

    def close(self) -> None:
        for file in (self.directory, *self.tasks):
            if file is not None:
                os.close(file)


@dataclass(frozen=True, slots=True)
class WatchFds:
    """What watches over a group without knowing its path; the descriptors belong to the holder.

    oom: a file with a line ``oom_kill N``, None without the memory controller. procs: a list of pids, on v2 without
    those of execs. kill: on cgroup2, kills everything by a "1". events: on cgroup2, a file with a line ``populated N``
    that reports changes as POLLPRI.
    """

    oom: int | None
    procs: int
    kill: int | None
    events: int | None

    def close(self) -> None:
        for file in (self.oom, self.procs, self.kill, self.events):
            if file is not None:
                os.close(file)


def open_join_fds(layout: Layout, paths: Mapping[Hierarchy, str]) -> JoinFds:
    with ExitStack() as undo:
        directory, tasks = None, []
        for hierarchy, path in paths.items():
            if hierarchy is layout.unified:
                directory = open_group_file(
                    undo, hierarchy.directory(path), os.O_RDONLY | os.O_DIRECTORY
                )
            else:
                tasks.append(
                    open_group_file(undo, f"{hierarchy.directory(path)}/tasks", os.O_WRONLY)
                )
        undo.pop_all()
        return JoinFds(directory, tuple(tasks))


def open_group_file(undo: ExitStack, path: str, flags: int) -> int:
    try:
        file = os.open(path, flags | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound(f"cgroup: {path}: does not exist") from None
    undo.callback(os.close, file)
    return file
