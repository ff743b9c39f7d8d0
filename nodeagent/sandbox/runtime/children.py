"""The processes below one of ours: making them, and learning of their end.

A launcher and a supervisor are child subreapers (prctl(2)): besides what they fork, they become the parent of its
orphaned descendants. The owner of a known child is told of its end while it is still a zombie, so that the end can be
written down before the kernel forgets it; others are just reaped.
"""

import errno
import os
import signal
import socket
from collections.abc import Callable, Collection
from typing import NamedTuple, NoReturn

from nodeagent.linux import syscalls
from nodeagent.sandbox.runtime.loop import Loop, guarded

Ended = Callable[[int], None]


class Child(NamedTuple):
    """A process that was made. The pidfd belongs to the caller."""

    pid: int
    pidfd: int


class Children:
    """The children of this process; there is one object of this class."""

    def __init__(self, loop: Loop, unowned: Callable[[], None] = lambda: None) -> None:
        """Become a child subreaper. unowned: called when a child without owner has ended, to `adopt` it at last."""
        self._owners: dict[int, Ended] = {}
        self._unowned = unowned
        syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
        self._loop = loop
        self._pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # A handler that does nothing: without one Python installs none, and nothing is written to the pipe.
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        loop.watch(self._pipe[0], self._signalled)

    def spawn(
        self,
        main: Callable[[], None],
        ended: Ended,
        *,
        keep: Collection[int],
        flags: int = 0,
        cgroup: int = -1,
    ) -> Child:
        """Run `main` in a child that has the descriptors `keep` and the three standard ones.

        ended: called with the exit code (128 + n for signal n) once it is over.
        """
        pid, pidfd = syscalls.clone3(flags, cgroup=cgroup)
        if pid == 0:
            _be_child(main, keep)
        self._owners[pid] = ended
        return Child(pid, pidfd)

    def spawn_connected(
        self,
        main: Callable[[int], None],
        ended: Ended,
        *,
        keep: Collection[int],
        flags: int = 0,
        cgroup: int = -1,
    ) -> tuple[Child, socket.socket]:
        """Spawn a child with a connection to us: `main` gets the child's end of it, the caller ours."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            end = theirs.fileno()
            try:
                child = self.spawn(
                    lambda: main(end), ended, keep=[end, *keep], flags=flags, cgroup=cgroup
                )
            except BaseException:
                ours.close()
                raise
        return child, ours

    def adopt(self, pid: int, ended: Ended) -> None:
        """Tell `ended` when the process `pid` ends, if we are its parent by then."""
        self._owners[pid] = ended

    def adopt_sibling(self, pid: int, ended: Ended) -> Child:
        """Own a child that another child has made for us (CLONE_PARENT), and tell `ended` when it ends.

        Raises ProcessLookupError where there is no such child, and FileExistsError where it is known already.
        """
        pidfd = os.pidfd_open(pid)
        try:
            if pid in self._owners:
                raise FileExistsError(errno.EEXIST, "a child that is known already", str(pid))
            # It only asks whether this is a child: ECHILD if not (waitid(2); P_PIDFD since Linux 5.4).
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            os.close(pidfd)
            raise ProcessLookupError(errno.ESRCH, "not a child of ours", str(pid)) from None
        except BaseException:
            os.close(pidfd)
            raise
        self._owners[pid] = ended
        return Child(pid, pidfd)

    def any(self) -> bool:
        """Whether there are children, even dead ones."""
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        return True

    def kill(self) -> None:
        """Send SIGKILL to all there are, known or not (proc(5); not every kernel lists them)."""
        try:
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                pids = file.read().split()
        except FileNotFoundError:
            return
        # No pid can be another process's yet: a child that ends stays a zombie until this process reaps it.
        for pid in pids:
            os.kill(int(pid), signal.SIGKILL)

    def _signalled(self, _events: int) -> None:
        try:
            os.read(self._pipe[0], 4096)
        except BlockingIOError:
            pass
        self._loop.persist(self.reap, "children cannot be reaped")

    def reap(self) -> None:
        """Deal with every child that has ended."""
        while True:
            try:
                end = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if end is None:
                return
            self._bury(end)

    def _bury(self, end: os.waitid_result) -> None:
        # The owner is asked for after the call, which may `adopt` the process. Reaped last: until then nobody else gets
        # its pid, and its end can still be read (proc(5)).
        if end.si_pid not in self._owners:
            guarded(self._unowned)
        owner = self._owners.pop(end.si_pid, None)
        if owner is not None:
            guarded(owner, exit_code(end))
        os.waitid(os.P_PID, end.si_pid, os.WEXITED)


def exit_code(end: os.waitid_result) -> int:
    """The exit code in a shell's terms: 0-255, or 128 + n for signal n."""
    return end.si_status if end.si_code == os.CLD_EXITED else 128 + end.si_status


def _be_child(main: Callable[[], None], keep: Collection[int]) -> NoReturn:
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        close_others(keep)
        main()
    finally:
        os._exit(70)  # EX_SOFTWARE: `main` ends the process itself


def close_others(keep: Collection[int]) -> None:
    """Close all descriptors but `keep` and 0, 1, 2."""
    first = 3
    for descriptor in sorted(keep):
        if descriptor >= first:
            if descriptor > first:
                syscalls.close_range(first, descriptor - 1)
            first = descriptor + 1
    syscalls.close_range(first)
