"""Cgroups, of which a supervisor has open files: to have processes join them, and to kill all that are in them."""

import os
import signal
import stat
from collections.abc import Collection, Sequence

from nodeagent.sandbox.runtime.loop import Loop

_PAUSE_MS = 10
_MAX_PASSES = 500
_BATCH = 128


def split_join_fds(fds: Sequence[int]) -> tuple[int, list[int]]:
    """The directory of cgroup v2, -1 without one, and the `tasks` files of v1."""
    directories = [fd for fd in fds if stat.S_ISDIR(os.fstat(fd).st_mode)]
    # A list: see the rules of this package.
    return directories[0] if directories else -1, [fd for fd in fds if fd not in directories]


class Group:
    """A cgroup that is used by open files alone. kill: its cgroup.kill (v2, Linux 5.14); procs: its pids, for v1.

    The descriptors belong to the group.
    """

    def __init__(self, loop: Loop, *, procs: int | None, kill: int | None) -> None:
        self._loop = loop
        self.procs = procs
        self.kill_file = kill
        self._passes = 0
        self._closing = False

    def kill(self) -> None:
        """Send SIGKILL to all processes, and to what they still fork. Does not wait for their end."""
        if self.kill_file is not None:
            try:
                os.write(self.kill_file, b"1")
            except OSError:
                pass  # the cgroup has been removed, so it was empty
        elif self.procs is not None:
            self._passes = _MAX_PASSES
            self._pass()

    def _pass(self) -> None:
        """Kill what is listed, again and again until nothing is: v1 has no atomic kill."""
        self._passes -= 1
        pids = self._pids()
        for start in range(0, len(pids), _BATCH):
            self._kill_listed(pids[start : start + _BATCH])
        if pids and self._passes > 0:
            self._loop.call_after(_PAUSE_MS, self._pass)
        else:
            self._passes = 0
            self._close_if_due()

    def _kill_listed(self, pids: Collection[int]) -> None:
        """Kill what is listed after its pidfd was opened, too: otherwise the pid may be another process's by now."""
        pidfds = {pid: pidfd for pid in pids if (pidfd := _open(pid)) is not None}
        listed = set(self._pids())
        for pid, pidfd in pidfds.items():
            if pid in listed:
                _kill(pidfd)
            os.close(pidfd)

    def _pids(self) -> list[int]:
        if self.procs is None:
            return []
        chunks = []
        offset = 0
        try:
            while chunk := os.pread(self.procs, 65536, offset):
                chunks.append(chunk)
                offset += len(chunk)
        except OSError:  # the cgroup has been removed
            return []
        own = os.getpid()
        return [pid for line in b"".join(chunks).split() if (pid := int(line)) not in (0, own)]

    def close(self) -> None:
        """Close the descriptors, once a kill that is under way has come to its end."""
        self._closing = True
        self._close_if_due()

    def _close_if_due(self) -> None:
        if self._closing and not self._passes:
            for descriptor in (self.procs, self.kill_file):
                if descriptor is not None:
                    os.close(descriptor)
            self.procs = self.kill_file = None


def _open(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def _kill(pidfd: int) -> None:
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        pass
