"""Errors of the kernel that say that something has run out: their codes, and texts that name a remedy.

They arise wherever something is made, in all processes of a node, and are told apart by their number alone.
"""

import errno
from typing import NamedTuple

import grpc


class Shortage(NamedTuple):
    """remedy: what the operator can do, for the end of the text."""

    code: grpc.StatusCode
    remedy: str


_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
_SPACE = "free space or inodes there (df, df -i), for one by removing pods or images"
_DESCRIPTORS = "a process of the agent has reached its limit; raise LimitNOFILE of its unit"
_PROCESSES = (
    "a limit of processes and threads is reached: TasksMax of the agent's unit, the pods' pids limit, or "
    "kernel.pid_max"
)
_SHORTAGES = {
    errno.ENOSPC: Shortage(_EXHAUSTED, _SPACE),
    errno.EDQUOT: Shortage(_EXHAUSTED, _SPACE),
    errno.EMFILE: Shortage(_EXHAUSTED, _DESCRIPTORS),
    errno.ENFILE: Shortage(_EXHAUSTED, "the node has reached fs.file-max"),
    errno.ENOMEM: Shortage(_EXHAUSTED, "the node, or the agent's unit, is out of memory"),
    errno.EAGAIN: Shortage(_EXHAUSTED, _PROCESSES),
    errno.EROFS: Shortage(
        grpc.StatusCode.FAILED_PRECONDITION,
        "the kernel's log says why, if nobody has mounted it so",
    ),
}
_NO_THREAD = "can't start new thread"  # how CPython says that pthread_create(3) failed


def of(error: Exception) -> Shortage | None:
    """What has run out, where that is why something failed."""
    if isinstance(error, OSError) and error.errno is not None:
        return _SHORTAGES.get(error.errno)
    if isinstance(error, RuntimeError) and str(error) == _NO_THREAD:
        return Shortage(_EXHAUSTED, _PROCESSES)
    return None


def text(error: Exception, shortage: Shortage) -> str:
    """On which file, if on any, what failed, and what can be done."""
    if not isinstance(error, OSError):
        return f"no thread can be started; {shortage.remedy}"
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror}; {shortage.remedy}"
