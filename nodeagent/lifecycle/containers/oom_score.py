"""The oom_score_adj of running containers: the OOM killer's preference for each of their processes (proc(5))."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from nodeagent.errors import PermissionDenied

_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC

Processes = Callable[[], list[int]]


@contextmanager
def changed(processes: Processes, old: int, new: int) -> Iterator[None]:
    """Set the score of all processes, and the old one again if what follows fails. 0 changes nothing, as in the CRI.

    Raises PermissionDenied: a lower score than they were started with takes CAP_SYS_RESOURCE.
    """
    if new in (0, old):
        yield
        return
    try:
        _set(processes, new)
        yield
    except BaseException:
        with suppress(PermissionDenied):
            _set(processes, old)
        raise


def _set(processes: Processes, score: int) -> None:
    """Set the score of all processes, those that are forked meanwhile included; a child inherits the score."""
    done: set[int] = set()
    while new := set(processes()) - done:
        with ExitStack() as opened:
            directories = {pid: _open(opened, pid) for pid in new}
            # Listed before and after its directory was opened: the pid was not another process's in between.
            for pid in new.intersection(processes()):
                _write(directories[pid], score)
        done |= new


def _open(opened: ExitStack, pid: int) -> int:
    """The directory of this very process, whichever has its pid later; -1 for one that has ended."""
    try:
        directory = os.open(f"/proc/{pid}", _FLAGS)
    except FileNotFoundError:
        return -1
    opened.callback(os.close, directory)
    return directory


def _write(directory: int, score: int) -> None:
    if directory == -1:
        return
    try:
        file = os.open("oom_score_adj", os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory)
        try:
            os.write(file, str(score).encode())
        finally:
            os.close(file)
    except (FileNotFoundError, ProcessLookupError):
        return
    except PermissionError:
        raise PermissionDenied(f"oom_score_adj {score}: needs CAP_SYS_RESOURCE") from None
