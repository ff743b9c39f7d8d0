"""The first process of a PID namespace that the containers of a pod share.

It holds the namespace and reaps what becomes an orphan in it, and nothing else. A container may look at it, and one
with CAP_SYS_PTRACE may make it do what it wants: so it has no file, no descriptor, no right and no user.
"""

import os
import signal
from typing import NoReturn

from nodeagent.linux import mounts, syscalls
from nodeagent.sandbox import process

TITLE = "pod"

_NOBODY = 65534


def main(directory: str) -> NoReturn:
    """directory: any one; what is mounted there is seen by nobody else."""
    process.set_title(TITLE, TITLE)
    _leave_files(directory)
    _drop_rights()
    signals = {signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_SETMASK, signals)
    while True:
        signal.sigwait(signals)
        _reap()


def _leave_files(directory: str) -> None:
    syscalls.unshare(syscalls.CLONE_NEWNS)
    mounts.isolate()
    syscalls.mount("none", directory, "tmpfs", syscalls.MS_RDONLY, "size=0,nr_inodes=1")
    mounts.enter_root(os.open(directory, os.O_PATH | os.O_DIRECTORY))
    syscalls.close_range(0)


def _drop_rights() -> None:
    os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(
        _NOBODY, _NOBODY, _NOBODY
    )  # clears all sets of capabilities, too (capabilities(7))
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    process.hide()


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
