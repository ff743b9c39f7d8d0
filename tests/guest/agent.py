"""In the guest: runs the command of job.json, copies its output to the host, and powers off with its exit status.

The first process of the guest, or a service of its systemd. Standard library only: it is copied and run alone.
"""

import ctypes
import json
import os
import select
import signal
import time
from pathlib import Path
from typing import TypedDict

CONTROL = Path("/run/guest/control")
POWER_OFF = 0x4321FEDC  # LINUX_REBOOT_CMD_POWER_OFF of reboot(2)
LINGER_SECONDS = 1.0  # for what still holds the command's output when it has exited


class Job(TypedDict):
    command: list[str]
    directory: str
    environment: dict[str, str]


def main() -> None:
    job = json.loads((CONTROL / "job.json").read_text())
    child, outputs = start(job)
    status = copy_until_exit(child, outputs)
    libc = ctypes.CDLL(None)
    libc.syncfs(os.open(job["directory"], os.O_RDONLY))  # the host may cut the power from here on
    append("status", b"%d\n" % (status if status >= 0 else 128 - status))
    libc.reboot(POWER_OFF)


def start(job: Job) -> tuple[int, dict[int, int]]:
    """The command's pid, and the file for each of its pipes."""
    pipes = {name: os.pipe() for name in ("stdout", "stderr")}
    child = os.fork()
    if child == 0:
        os.setsid()
        for number, name in enumerate(("stdout", "stderr"), 1):
            os.dup2(pipes[name][1], number)
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        execute(job)
    for _, write_end in pipes.values():
        os.close(write_end)
    return child, {read_end: open_output(name) for name, (read_end, _) in pipes.items()}


def execute(job: Job) -> None:
    try:
        os.chdir(job["directory"])
        os.execvpe(job["command"][0], job["command"], job["environment"])
    except OSError as error:
        os.write(2, f"{job['command'][0]}: {error}\n".encode())
        os._exit(127)


def copy_until_exit(child: int, outputs: dict[int, int]) -> int:
    """Also reaps every orphan, as the first process must. Returns the status, negative for a signal."""
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    status, exited_at = None, 0.0
    while status is None or (outputs and time.monotonic() - exited_at < LINGER_SECONDS):
        for reaped, code in reap(child):
            if reaped == child:
                status, exited_at = code, time.monotonic()
        ready, _, _ = select.select([*outputs, wake], [], [], 0.2)
        for descriptor in ready:
            if descriptor == wake:
                os.read(wake, 4096)
            elif not copy(descriptor, outputs[descriptor]):
                del outputs[descriptor]
    return status


def reap(child: int) -> list[tuple[int, int]]:
    reaped: list[tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1 if os.getpid() == 1 else child, os.WNOHANG)
        except ChildProcessError:
            return reaped
        if pid == 0:
            return reaped
        reaped.append((pid, os.waitstatus_to_exitcode(status)))


def copy(source: int, target: int) -> bool:
    data = os.read(source, 65536)
    os.write(target, data)
    return bool(data)


def open_output(name: str) -> int:
    return os.open(CONTROL / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)


def append(name: str, data: bytes) -> None:
    descriptor = open_output(name)
    os.write(descriptor, data)
    os.fsync(descriptor)


main()
