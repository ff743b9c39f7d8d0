"""The first process of a PID namespace that the containers of a pod share.

It holds the namespace, and has the kernel reap what becomes an orphan in it. A container may look at it, and one with
CAP_SYS_PTRACE may take it over: so it is worthless. It has no file, no descriptor, no capability and no user, a cgroup
in which no device may be used, and a filter that lets it do nothing but wait and end.
"""

import os
import signal
import socket
from collections.abc import Sequence
from typing import NoReturn

from nodeagent.linux import capabilities, mounts, processes, seccomp, syscalls
from nodeagent.sandbox import protocol
from nodeagent.sandbox.runtime import process, procfs

TITLE = "pod"

_NOBODY = 65534
# The pod ends with it, and it cannot grow; other runtimes use the same value for this process.
_OOM_SCORE_ADJ = -998


def main(status: int, tasks: Sequence[int], directory: str) -> NoReturn:
    """Report with ``{}`` and a detached procfs of the new PID namespace, and wait for ever.

    No other process is in the namespace before that. tasks: of cgroups of v1, to be joined; on v2 it is born in one.
    directory: any one; what is mounted there is seen by nobody else.
    """
    os.setsid()  # kill(2) of 0 would reach the supervisors of all pods
    for file in tasks:
        os.write(file, b"0")
    # All that takes a /proc comes before the node's is left.
    process.set_title(TITLE, TITLE)
    _spare_from_oom()
    report = socket.socket(fileno=status)
    shared_proc = procfs.make()
    _leave_node(directory)
    _drop_rights()
    protocol.send(report, protocol.encode({}), [shared_proc])
    # After the report, which takes a socket; the filter last, which forbids to close anything.
    syscalls.close_range(0)
    seccomp.install(seccomp.allow_only(syscalls.PAUSE_CALLS), 0)
    while True:
        syscalls.pause()


def _spare_from_oom() -> None:
    try:
        processes.set_oom_score(_OOM_SCORE_ADJ)
    except OSError:
        pass  # the supervisor could not be protected either, and has said so


def _leave_node(directory: str) -> None:
    syscalls.unshare(syscalls.CLONE_NEWNS)
    mounts.isolate()
    syscalls.mount("none", directory, "tmpfs", syscalls.MS_RDONLY, "size=0,nr_inodes=1")
    mounts.enter_root(os.open(directory, os.O_PATH | os.O_DIRECTORY))


def _drop_rights() -> None:
    """Give up users, capabilities and the reaping of children.

    Ignoring SIGCHLD makes the kernel reap them (wait(2), "NOTES"): no code of ours has to run again.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    capabilities.drop_bounding(0)
    os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    syscalls.capset(0, 0, 0)
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    process.hide()
