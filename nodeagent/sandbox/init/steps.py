"""What the steps of a mount plan have in common: the form of their errors, and finding a path of the container."""

import errno
import os
import stat

from nodeagent.errors import FailedPrecondition
from nodeagent.linux import confined

DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC

# Errors that are the fault of a path of a request, an image or a volume; EISDIR where a file was to be mounted.
_FAULTS_OF_A_PATH = frozenset(
    (errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EROFS, errno.ENAMETOOLONG)
)


def of_step(step: str, error: OSError) -> OSError | FailedPrecondition:
    """An error of the kernel, with the step of the plan that it is about."""
    if error.errno in _FAULTS_OF_A_PATH:
        return FailedPrecondition(f"{step}: {os.strerror(error.errno)}")
    return OSError(error.errno, f"{step}: {error.strerror or error}", error.filename)


def is_directory(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


def find(root: int, path: str) -> int | None:
    """What the container finds at a path, as an O_PATH descriptor; None if it finds nothing."""
    try:
        return confined.open_path(root, path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, *_FAULTS_OF_A_PATH):
            raise
        return None
