"""The processes of a group: listing, killing and thawing them.

cgroup2 kills and thaws by one write that covers the groups below as well, also in a hybrid, where it has no
controllers. Plain v1 has the freezer, and signals.
"""

import errno
import os
import signal
from typing import Protocol

from nodeagent.cgroups import tree


class Tracker(Protocol):
    """The processes of a group and of those below it; a group that has been removed has none."""

    def processes(self) -> list[int]: ...

    def populated(self) -> bool:
        """Whether there is a process; zombies do not count."""
        ...

    def kill(self) -> None:
        """Send SIGKILL to every process, and to those that they make meanwhile. Does not wait for their end."""
        ...

    def thaw(self) -> None: ...


class UnifiedTracker:
    """A tracker by the group's directory in cgroup2. freezer: its directory in v1's freezer, on a hybrid."""

    def __init__(self, directory: str, freezer: str | None = None) -> None:
        self._directory = directory
        self._freezer = freezer

    def processes(self) -> list[int]:
        return _processes(self._directory)

    def populated(self) -> bool:
        return "populated 1" in _read(self._directory, "cgroup.events").splitlines()

    def kill(self) -> None:
        # Linux 5.14; it covers processes that are forked meanwhile (cgroup-v2.rst, cgroup.kill).
        _write(self._directory, "cgroup.kill", "1")
        self._thaw_legacy()  # in v1's freezer a process does not act on its signal

    def thaw(self) -> None:
        _write(self._directory, "cgroup.freeze", "0")
        self._thaw_legacy()

    def _thaw_legacy(self) -> None:
        if self._freezer:
            _thaw_legacy(self._freezer)


class LegacyTracker:
    """A tracker by the group's v1 directory; freezer: whether that is in the freezer's hierarchy."""

    def __init__(self, directory: str, *, freezer: bool) -> None:
        self._directory = directory
        self._freezer = freezer

    def processes(self) -> list[int]:
        return _processes(self._directory)

    def populated(self) -> bool:
        return any(_processes_of(*group) for group in tree.bottom_up(self._directory))

    def kill(self) -> None:
        """Kill all processes by signals."""
        if self._freezer:
            _set_state(
                self._directory, "FROZEN"
            )  # what is frozen cannot fork before its signal comes
        try:
            seen: set[int] = set()
            while new := set(self.processes()) - seen:
                for pid in new:
                    _kill(pid)
                seen |= new
        finally:
            if self._freezer:
                self.thaw()

    def thaw(self) -> None:
        if self._freezer:
            _thaw_legacy(self._directory)


def _thaw_legacy(directory: str) -> None:
    """Thaw a group and those below it, which a privileged container may have frozen itself."""
    for parent, name in tree.bottom_up(directory):
        _set_state(name, "THAWED", parent)


def _set_state(directory: str, state: str, parent: int | None = None) -> None:
    _write(directory, "freezer.state", state, parent)


def _processes(directory: str) -> list[int]:
    """The pids in a group and in those below it."""
    texts = [_processes_of(*group) for group in tree.bottom_up(directory)]
    # A process that this PID namespace does not see is shown as 0.
    return sorted({int(pid) for text in texts for pid in text.split()} - {0})


def _processes_of(parent: int, name: str) -> str:
    return _read(name, "cgroup.procs", parent)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _read(directory: str, name: str, parent: int | None = None) -> str:
    """Read a file; "" for a removed group, and for the processes of a threaded group, which its domain lists."""
    try:
        return tree.read(f"{directory}/{name}", parent)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
            return ""
        raise


def _write(directory: str, name: str, value: str, parent: int | None = None) -> None:
    """Write to a file; nothing is written for a group that has been removed."""
    try:
        file = os.open(f"{directory}/{name}", os.O_WRONLY | os.O_CLOEXEC, dir_fd=parent)
        try:
            os.write(file, value.encode())
        finally:
            os.close(file)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            raise
