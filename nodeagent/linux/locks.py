"""The holders of POSIX locks of a file, as /proc/locks shows it (proc_locks(5)).

The file is not opened: closing it would drop the caller's own locks of it (fcntl(2)).
"""

import os


def holders(path: str | os.PathLike[str]) -> list[int]:
    """The pids of other processes with a lock of the file, those that may write first; none where there is no file."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return []
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    found: dict[int, bool] = {}
    for line in _text("/proc/locks").splitlines():
        # "1: POSIX  ADVISORY  WRITE 1234 fe:00:5678 120 120"; who waits for a lock has "->" before the kind.
        fields = line.split()
        if len(fields) < 6 or fields[5] != device:
            continue
        pid = int(fields[4])
        if pid > 0 and pid != os.getpid():
            found[pid] = found.get(pid, False) or fields[3] == "WRITE"
    return sorted(found, key=lambda pid: (not found[pid], pid))


def described(pid: int) -> str:
    """A process for a message: its pid and its name."""
    try:
        return f"process {pid} ({_text(f'/proc/{pid}/comm').strip()})"
    except OSError:
        return f"process {pid}"


def _text(path: str) -> str:
    with open(path, errors="replace") as file:
        return file.read()
