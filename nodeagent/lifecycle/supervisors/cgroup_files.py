"""The open files of a cgroup that a supervisor needs: to join it, to watch it and to kill it."""

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from nodeagent.cgroups.group import Cgroup
from nodeagent.sandbox.agent.client import CgroupFds


@contextmanager
def supervisor_files(group: Cgroup) -> Iterator[CgroupFds]:
    """Open the files for one message, which carries copies of them, and close them afterwards."""
    join = group.join_fds()
    try:
        watch = group.watch_fds()
        try:
            yield CgroupFds(join=join, oom=watch.oom, procs=watch.procs, kill=watch.kill)
        finally:
            close_all((watch.oom, watch.procs, watch.kill))
    finally:
        close_all(join)


@contextmanager
def joining_files(group: Cgroup) -> Iterator[list[int]]:
    """The files to which a process writes "0" to join the group."""
    fds = group.join_fds()
    files: list[int] = []
    try:
        for fd in fds:
            is_directory = stat.S_ISDIR(os.fstat(fd).st_mode)
            flags = os.O_WRONLY | os.O_CLOEXEC
            files.append(os.open("cgroup.procs", flags, dir_fd=fd) if is_directory else os.dup(fd))
        yield files
    finally:
        close_all((*fds, *files))


def close_all(fds: Iterable[int | None]) -> None:
    for fd in fds:
        if fd is not None:
            os.close(fd)
