"""A sealed copy of the Python interpreter, for processes that enter containers.

A container may get hold of the executable of a process that joins it, as /proc/PID/exe (CVE-2019-5736): then this is
a sealed file in memory, and never the node's interpreter.
"""

import fcntl
import os
import shutil

# In linux/memfd.h since 6.3, where a sysctl may make memfds not executable by default.
_MFD_EXEC = 0x10
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def sealed_copy(path: str) -> int:
    """A descriptor of the copy, to be executed."""
    copy = _create_memfd()
    try:
        with open(path, "rb") as source, open(copy, "wb", closefd=False) as target:
            shutil.copyfileobj(source, target)
        # After the file object has been flushed: a sealed file takes no more writes (fcntl(2), F_SEAL_WRITE).
        fcntl.fcntl(copy, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(copy)
        raise
    return copy


def _create_memfd() -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create("nodeagent", flags | _MFD_EXEC)
    except OSError:
        return os.memfd_create("nodeagent", flags)
