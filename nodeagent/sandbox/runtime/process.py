"""What a launcher or a supervisor does to itself, and to its children: names, protection, and who may trace it."""

import os
import signal
import stat
from collections.abc import Mapping

from nodeagent.linux import syscalls
from nodeagent.linux.processes import set_oom_score, stat_fields

# What the command of a supervisor begins with, and that of its children until they execute another one.
SUPERVISOR = "nodeagent.sandbox.supervisor "

_SPARED = -999


def set_title(name: str, title: str) -> None:
    """Set what ps shows: a name of 15 bytes, and a title as the command, in the memory of the arguments (proc(5))."""
    syscalls.set_name(name)
    fields = stat_fields("self")  # arg_start and arg_end are 48 and 49 of proc_pid_stat(5)
    start, end = int(fields[45]), int(fields[46])
    text = title.encode()[: end - start - 1].ljust(end - start, b"\0")
    try:
        memory = os.open("/proc/self/mem", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return  # a kernel may forbid it (proc_mem.restrict_write); only the short name is set then
    try:
        os.pwrite(memory, text, start)
    except OSError:
        pass
    finally:
        os.close(memory)


def hide() -> None:
    """Forbid everyone without CAP_SYS_PTRACE to see our memory, descriptors or executable (prctl(2))."""
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)


def protect_from_oom() -> str:
    """Have the OOM killer spare this process and what it forks; returns why it cannot, or ""."""
    try:
        set_oom_score(_SPARED)
    except OSError as error:
        return f"oom_score_adj {_SPARED}: {error.strerror}"
    return ""


def ignore_terminal() -> None:
    """Ignore Ctrl-C, which is meant for others, and SIGPIPE: a connection that has ended is an error of the call."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)


def is_of_ours(pid: int) -> bool:
    """Whether a process still executes this program, and not a container's; True of a dead one."""
    try:
        return os.path.samestat(os.stat(f"/proc/{pid}/exe"), os.stat("/proc/self/exe"))
    except OSError:
        return True


def ours_in(pid_namespace: os.stat_result) -> list[int]:
    """pidfds of all in a PID namespace that still execute this program: processes that are prepared there, visibly."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            pidfd = _open_ours(int(name), pid_namespace)
            if pidfd is not None:
                found.append(pidfd)
    return found


def _open_ours(pid: int, pid_namespace: os.stat_result) -> int | None:
    """A pidfd of the process if it executes this program.

    It is examined after its pidfd has been opened, and has not been reaped then: the answer is about this process.
    """
    try:
        if not os.path.samestat(os.stat(f"/proc/{pid}/ns/pid"), pid_namespace):
            return None
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            titled = file.read(len(SUPERVISOR)) == SUPERVISOR.encode()
        if (
            titled
            and os.path.samestat(os.stat(f"/proc/{pid}/exe"), os.stat("/proc/self/exe"))
            and os.path.samestat(os.stat(f"/proc/{pid}/ns/pid"), pid_namespace)
        ):
            return pidfd
    except OSError:
        pass
    os.close(pidfd)
    return None


def reopen_pipes(pid: int, inodes: Mapping[str, int]) -> dict[str, int]:
    """Our ends of the pipes that a process still has for its standard streams. inodes: by the name of the stream."""
    found = {}
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        flags = os.O_NONBLOCK | os.O_CLOEXEC | (os.O_RDONLY if number else os.O_WRONLY)
        try:
            end = _reopen_pipe(f"/proc/{pid}/fd/{number}", inodes.get(name), flags)
        except OSError:
            continue
        if end is not None:
            found[name] = end
    return found


def _reopen_pipe(path: str, inode: int | None, flags: int) -> int | None:
    """Open the pipe; None if it is another file: the process chooses that, so it is examined before it is opened."""
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        status = os.fstat(place)
        found = status.st_dev, status.st_ino
        if not stat.S_ISFIFO(status.st_mode) or found != (_pipe_device(), inode):
            return None
        return os.open(f"/proc/self/fd/{place}", flags)
    finally:
        os.close(place)


def _pipe_device() -> int:
    """The device of the kernel's own file system of unnamed pipes; a FIFO with the same inode is on another."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        return os.fstat(reader).st_dev
    finally:
        os.close(reader)
        os.close(writer)
