"""The open files of a cgroup that a supervisor needs: how to join it, watch it and kill it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from nodeagent.cgroups.group import Cgroup
from nodeagent.sandbox.client import CgroupFds


@contextmanager
def handover(group: Cgroup) -> Iterator[CgroupFds]:
    """Opened for one message, which carries copies of them; closed on return."""
    join = group.join_fds()
    watch = group.watch_fds()
    try:
        yield CgroupFds(join=join, oom=watch.oom, procs=watch.procs, kill=watch.kill)
    finally:
        for fd in (*join, watch.oom, watch.procs, watch.kill):
            if fd is not None:
                os.close(fd)
