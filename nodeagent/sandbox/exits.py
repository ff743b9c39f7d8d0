"""Ends of processes, and their records, which outlive whoever observed them.

The record is written while the process is still a zombie. The first one that is written stays: a launcher and a
successor may both see the same end. Its file is there before the process is: blanks, until there is an end to record.
"""

import fcntl
import os
import signal
import struct
import time

from nodeagent import files
from nodeagent.linux import oom, processes
from nodeagent.sandbox import protocol
from nodeagent.sandbox.spec import Exit

SIGKILLED = 128 + 9
UNKNOWN = 255

_DIRECTORY = "exits"
_MODE = 0o600
_ROOM_BYTES = 256

# PIDFD_GET_INFO of linux/pidfd.h, _IOWR(0xFF, 11, struct pidfd_info), since 6.13; the exit code since 6.15.
_PIDFD_INFO = struct.Struct("=QQ11Ii")
_PIDFD_GET_INFO = 3 << 30 | _PIDFD_INFO.size << 16 | 0xFF << 8 | 11
_PIDFD_INFO_EXIT = 1 << 3


def make_directory(pod: str) -> None:
    files.ensure_directory(f"{pod}/{_DIRECTORY}", 0o700)


def reserve(pod: str, container: str) -> None:
    """Make room for the record, so that it can be written even if the file system is full by then."""
    file = os.open(_path(pod, container), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, _MODE)
    try:
        os.write(file, b" " * _ROOM_BYTES)
    finally:
        os.close(file)


def record(pod: str, container: str, end: Exit) -> Exit:
    """Make the end of a container durable, and return what is: `end`, or an earlier record.

    pod: the pod's directory. It is written in place, with one call and into one page: nobody reads half of it.
    """
    file = os.open(_path(pod, container), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _MODE)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        earlier = _read(file)
        if earlier is None:
            os.pwrite(file, protocol.to_json(end).ljust(_ROOM_BYTES), 0)
            os.fsync(file)
    finally:
        os.close(file)
    return earlier or end


def read(pod: str, container: str) -> Exit | None:
    """The record of a container, None without one that can be read."""
    try:
        file = os.open(_path(pod, container), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return _read(file)
    finally:
        os.close(file)


def _read(file: int) -> Exit | None:
    try:
        end = protocol.checked(Exit, protocol.decode(os.pread(file, 4096, 0)))
        numbers: tuple[object, ...] = (end["code"], end["at"])
        if not all(isinstance(number, int) for number in numbers):
            return None
    except ValueError:  # blank: it has not ended; a damaged one is no end either
        return None
    return end


def remove(pod: str, container: str) -> None:
    try:
        os.unlink(_path(pod, container))
    except FileNotFoundError:
        pass


def _path(pod: str, container: str) -> str:
    return f"{pod}/{_DIRECTORY}/{container}.json"


def judge(code: int, *, killed: bool, oom_before: int, counter: int | None) -> Exit:
    """The end of a process that has just ended with `code`: the one place that decides whether it was OOM-killed.

    It was if SIGKILL ended it, no supervisor had sent that (`killed`, which `facts.was_killed` reads for others), and
    its counter of `oom_kills` is higher than when the process was made (`oom_before`).
    """
    struck = code == SIGKILLED and not killed and oom_kills(counter) > oom_before
    return {"code": code, "at": time.time_ns(), "oom": struck}


def oom_kills(counter: int | None) -> int:
    """The number of OOM kills, from an open memory.events (v2) or memory.oom_control (v1)."""
    if counter is None:
        return 0
    try:
        return oom.kills(os.pread(counter, 4096, 0))
    except OSError:  # the cgroup has been removed
        return 0


def code_of_watched(pid: int, pidfd: int) -> int | None:
    """The exit code of a process that is not our child, once it has ended; None if it is not known.

    It is read from the zombie (proc(5), field 52 of stat), or from the pidfd after the process has been reaped.
    """
    status = _status_of_zombie(pid, pidfd)
    if status is None:
        status = _status_of_reaped(pidfd)
    return None if status is None else _code(status)


def _status_of_reaped(pidfd: int) -> int | None:
    buffer = bytearray(_PIDFD_INFO.size)
    struct.pack_into("=Q", buffer, 0, _PIDFD_INFO_EXIT)
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, buffer)
    except OSError:
        return None
    mask, *_, status = _PIDFD_INFO.unpack(buffer)
    return status if mask & _PIDFD_INFO_EXIT else None


def _status_of_zombie(pid: int, pidfd: int) -> int | None:
    try:
        fields = processes.stat_fields(pid)
        signal.pidfd_send_signal(pidfd, 0)  # fails once it is reaped, when others may have its pid
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(fields[49]) if fields[0] == b"Z" else None


def _code(status: int) -> int:
    """The exit code of a wait status; 128 + n for signal n."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
