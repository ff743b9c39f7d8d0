"""User namespaces, and other namespaces that they own (user_namespaces(7)).

A namespace without a process lives as long as a descriptor of it is open.
"""

import os
import signal
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from nodeagent.linux import syscalls

_NAMES = {
    syscalls.CLONE_NEWUSER: "user",
    syscalls.CLONE_NEWNET: "net",
    syscalls.CLONE_NEWIPC: "ipc",
    syscalls.CLONE_NEWUTS: "uts",
    syscalls.CLONE_NEWPID: "pid",
    syscalls.CLONE_NEWCGROUP: "cgroup",
}
MAX_ID = (1 << 32) - 2  # (uid_t) -1 means "leave it" to chown(2) and setresuid(2)
_WALL = 0x40000000  # of wait4(2): children that end without SIGCHLD, too


class Mapping(Protocol):
    """What has the fields of an `Extent`."""

    @property
    def inside(self) -> int: ...
    @property
    def outside(self) -> int: ...
    @property
    def length(self) -> int: ...


class Extent(NamedTuple):
    """A line of /proc/PID/uid_map: ids from `inside` on are those from `outside` on."""

    inside: int
    outside: int
    length: int


def create(uid_map: Iterable[Extent], gid_map: Iterable[Extent], owned: int = 0) -> dict[int, int]:
    """Make a user namespace with these mappings, and new ones of the kinds `owned` (CLONE_NEW…) that it owns.

    Returns a descriptor for each, by its CLONE_NEW… flag.
    """
    kinds = [kind for kind in _NAMES if (owned | syscalls.CLONE_NEWUSER) & kind]
    # Without an exit signal no other wait of this process reaps the child: they lack __WALL (wait4(2)).
    pid, pidfd = syscalls.clone3(sum(kinds), exit_signal=0)
    if pid == 0:
        _wait_to_be_killed()
    try:
        proc = f"/proc/{_pid_in_procfs(pidfd)}"
        _write_map(f"{proc}/uid_map", uid_map)
        _write_map(f"{proc}/gid_map", gid_map)
        return {kind: os.open(f"{proc}/ns/{_NAMES[kind]}", os.O_RDONLY) for kind in kinds}
    finally:
        syscalls.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | _WALL)
        os.close(pidfd)


def _wait_to_be_killed() -> None:
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    while True:
        signal.pause()


def _pid_in_procfs(pidfd: int) -> int:
    """The pid of a process in the PID namespace of /proc, which may not be the caller's."""
    with open(f"/proc/self/fdinfo/{pidfd}", encoding="utf-8") as info:
        return next(int(line.split()[1]) for line in info if line.startswith("Pid:"))


def _write_map(path: str, extents: Iterable[Extent]) -> None:
    """Write a map of ids."""
    # All lines in one write: a map can be written once only (user_namespaces(7)).
    lines = "".join(f"{inside} {outside} {length}\n" for inside, outside, length in extents)
    file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(file, lines.encode())
    except OSError as error:
        text = f"map of ids {lines.strip()!r}: {error.strerror}"
        raise OSError(error.errno, text, path) from error
    finally:
        os.close(file)


def outside(inside: int, extents: Iterable[Mapping]) -> int:
    """The id that `inside` is outside the namespace; `ValueError` where it is not mapped."""
    for extent in extents:
        if extent.inside <= inside < extent.inside + extent.length:
            return extent.outside + inside - extent.inside
    raise ValueError(f"id {inside}: not mapped in the user namespace")
