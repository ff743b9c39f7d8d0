"""Descriptors by which another process joins a group or watches it, without knowing its path."""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from nodeagent.cgroups.hierarchy import Hierarchy, Layout
from nodeagent.errors import NotFound


@dataclass(frozen=True, slots=True)
class WatchFds:
    """Descriptors to watch a group with, owned by the holder.

    oom: a file with a line ``oom_kill N``, None without the memory controller. procs: a list of pids, on v2 without
    those of execs. kill: a "1" written to it kills all processes; None without cgroup2.
    """

    oom: int | None
    procs: int
    kill: int | None


def join_fds(layout: Layout, paths: Mapping[Hierarchy, str]) -> list[int]:
    """The directory of cgroup2, if there is one, and the `tasks` file of the group in each v1 hierarchy."""
    with ExitStack() as undo:
        fds = []
        for hierarchy, path in paths.items():
            if hierarchy is layout.unified:
                name, flags = "", os.O_RDONLY | os.O_DIRECTORY
            else:
                name, flags = "/tasks", os.O_WRONLY
            fds.append(open_file(undo, hierarchy.directory(path) + name, flags))
        undo.pop_all()
        return fds


def open_file(undo: ExitStack, path: str, flags: int) -> int:
    """Open a file of a group until `undo` closes it. Raises NotFound."""
    try:
        file = os.open(path, flags | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound(f"cgroup: {path}: does not exist") from None
    undo.callback(os.close, file)
    return file
