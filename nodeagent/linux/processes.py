"""Processes as proc(5) and pidfds show them: their start, whether a pid is still the same one, whether one ends."""

import os

# The flags of a process, counted from its state (proc(5)), and include/linux/sched.h.
_STAT_FLAGS, _PF_EXITING = 6, 0x4


def set_oom_score(score: int) -> None:
    """Set oom_score_adj (proc(5)); a value below the parent's takes CAP_SYS_RESOURCE."""
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write(str(score))


def start_ticks(pid: int) -> int:
    """The start of a process in clock ticks since boot; with the pid it identifies a process."""
    return int(stat_fields(pid)[19])


def stat_fields(pid: int | str) -> list[bytes]:
    """The fields of /proc/PID/stat from the third, the state, on: the second may contain anything (proc(5))."""
    file = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(file, 4096).rpartition(b") ")[2].split()
    finally:
        os.close(file)


def is_exiting(pid: int) -> bool:
    """Whether a process is ending, or has ended and was not reaped. Raises FileNotFoundError when there is none."""
    return bool(int(stat_fields(pid)[_STAT_FLAGS]) & _PF_EXITING)


def pid_of_pidfd(pid: int, descriptor: int) -> int:
    """The pid behind a pidfd that another process has open under this number (proc(5), fdinfo).

    Raises FileNotFoundError where that descriptor is not open, or the process has gone, and ValueError where it is no
    pidfd, or one of a process that has been reaped.
    """
    file = os.open(f"/proc/{pid}/fdinfo/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        fields = os.read(file, 4096).split()
    except ProcessLookupError as error:
        raise FileNotFoundError(error.errno, error.strerror, str(pid)) from None
    finally:
        os.close(file)
    found = int(fields[fields.index(b"Pid:") + 1]) if b"Pid:" in fields else -1
    if found <= 0:
        raise ValueError(f"descriptor {descriptor} of process {pid} is no pidfd of a process")
    return found


def is_filtered(pid: int) -> bool:
    """Whether a seccomp filter is in force; False of a process that is gone."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            return b"\nSeccomp:\t2\n" in file.read()
    except OSError:
        return False


def is_running(pid: int, ticks: int) -> bool:
    """Whether the process that had `pid` and started then still exists, also as a zombie."""
    try:
        return start_ticks(pid) == ticks
    except (FileNotFoundError, ProcessLookupError):
        return False


def open_pidfd(pid: int, ticks: int) -> int | None:
    """A pidfd of the process that started then; None if it does not exist any more."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    # Checked after it is open: a process that has the pid and the start now had them when the pidfd was opened.
    if is_running(pid, ticks):
        return pidfd
    os.close(pidfd)
    return None
