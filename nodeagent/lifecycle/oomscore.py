"""oom_score_adj of a container that runs: it belongs to each process, not to the cgroup (proc_pid_oom_score_adj(5))."""

import os
from contextlib import ExitStack

from nodeagent.cgroups.group import Cgroup
from nodeagent.errors import PermissionDenied


def adjust(group: Cgroup, score: int) -> None:
    """Set it for all processes of a group, also for those that they make meanwhile.

    Raises PermissionDenied: to go below what a process has takes SYS_RESOURCE.
    """
    seen: set[int] = set()
    while new := set(group.processes()) - seen:
        with ExitStack() as files:
            # An open file stays that of its process: a pid that is listed after it was opened had no other owner.
            opened = {pid: _open(pid, files) for pid in new}
            for pid in new.intersection(group.processes()):
                _write(opened[pid], score)
        seen |= new


def _open(pid: int, files: ExitStack) -> int | None:
    """None for a process that has gone."""
    try:
        file = os.open(f"/proc/{pid}/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    files.callback(os.close, file)
    return file


def _write(file: int | None, score: int) -> None:
    try:
        if file is not None:
            os.write(file, str(score).encode())
    except ProcessLookupError:
        pass
    except PermissionError as error:
        raise PermissionDenied(f"oom_score_adj: {score} is less than what is permitted") from error
