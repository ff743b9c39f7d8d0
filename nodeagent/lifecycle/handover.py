"""The open files of a cgroup that a supervisor needs: how to join it, watch it and kill it."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from nodeagent.cgroups.group import Cgroup, ExecGroup
from nodeagent.sandbox.client import CgroupFds


@contextmanager
def handover(group: Cgroup | ExecGroup) -> Iterator[CgroupFds]:
    """Opened for one message, which carries copies of them; closed on return."""
    join = group.join_fds()
    try:
        watch = group.watch_fds()
        try:
            yield CgroupFds(join=join, oom=watch.oom, procs=watch.procs, kill=watch.kill)
        finally:
            close_all((watch.oom, watch.procs, watch.kill))
    finally:
        close_all(join)


def close_all(fds: Iterable[int | None]) -> None:
    for fd in fds:
        if fd is not None:
            os.close(fd)
