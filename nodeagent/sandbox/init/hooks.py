"""Hooks of a container: programs of the node that are run at a stage of its life, and waited for.

They follow the OCI runtime specification ("POSIX-platform Hooks", "Lifecycle"): the state of the container on standard
input, only the variables that the hook names, a bound on its time. Standard library only: the first process of a
container runs those of createContainer and startContainer, a child of the supervisor the others.

Where a hook has more rights than the container, it is the first process of a PID namespace of its own: nobody in the
container sees it, and whatever it has started ends with it. It gets nothing of the container's: no variable, working
directory or descriptor. Its program, and each directory above it, belongs to root and can be changed by nobody else.
"""

import json
import os
import select
import signal
import stat
import time
from collections.abc import Callable
from typing import NoReturn

from nodeagent.errors import SHORTAGES, FailedPrecondition
from nodeagent.linux import syscalls
from nodeagent.sandbox.bundle import OCI_VERSION
from nodeagent.sandbox.spec import ContainerPlan, Hook
from nodeagent.text import one_line
from nodeagent.words import HookStage

# The stages of a creation that the supervisor runs, while the first process waits.
CREATION: tuple[HookStage, ...] = ("prestart", "createRuntime")

MAX_OUTPUT_BYTES = 1 << 20
_TAIL_BYTES = 1024
_READ_BYTES = 1 << 16
_PAUSE_MS = 20
_DEATH_MS = 5000  # for the end of a hook that was killed
_CANNOT_EXECUTE = 127
_UMASK = 0o022
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def of(plan: ContainerPlan, *stages: HookStage) -> list[tuple[HookStage, Hook]]:
    """The plan's hooks of the stages, in their order."""
    hooks = plan.get("hooks")
    if hooks is None:
        return []
    return [(stage, hook) for stage in stages for hook in hooks["stages"].get(stage, [])]


def state(plan: ContainerPlan, status: str, pid: int) -> bytes:
    """The state of a container (OCI runtime specification, "State"); without a pid once it is stopped."""
    hooks = plan["hooks"]
    told = {
        "ociVersion": OCI_VERSION,
        "id": plan["id"],
        "status": status,
        **({"pid": pid} if pid else {}),
        "bundle": hooks["bundle"],
        "annotations": hooks["annotations"],
    }
    return json.dumps(told).encode()


def run(stage: HookStage, hook: Hook, told: bytes, cwd: str, enter: Callable[[], None]) -> None:
    """Run a hook with more rights than the container. enter: called in its process, to be where it is to run.

    Raises FailedPrecondition, with the hook and the end of what it has written, when it fails.
    """
    what = f'hook {stage} "{hook["path"]}" of {hook["source"]}'
    program = _trusted(what, hook["path"])
    parent = os.pidfd_open(os.getpid())

    def main() -> None:
        os.chdir(cwd)
        enter()
        # After `enter`: a change of ids clears it. A parent that died before sends no signal any more.
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        if select.select([parent], [], [], 0)[0]:
            os._exit(_CANNOT_EXECUTE)

    try:
        _run(what, hook, program, told, main, syscalls.CLONE_NEWPID)
    finally:
        os.close(parent)


def run_inside(stage: HookStage, hook: Hook, told: bytes) -> None:
    """Run a hook in the place and with the rights of the container's program, which the caller is about to become."""
    what = f'hook {stage} "{hook["path"]}" of {hook["source"]}'
    _run(what, hook, hook["path"], told, lambda: None, 0)


# ---- the program ----


def _trusted(what: str, path: str) -> str:
    """The program behind a path of the node. Raises FailedPrecondition where others than root could change it."""
    try:
        program = os.path.realpath(path, strict=True)
        if not stat.S_ISREG(os.stat(program).st_mode):
            raise FailedPrecondition(f"{what}: is not a file")
        place = program
        while True:
            status = os.lstat(place)
            if status.st_uid != 0 or status.st_mode & _OTHERS_WRITE:
                raise FailedPrecondition(
                    f'{what}: "{place}" can be changed by others than root '
                    f"(owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):o})"
                )
            if place == "/":
                return program
            place = os.path.dirname(place)
    except OSError as error:
        if error.errno in SHORTAGES:
            raise
        raise FailedPrecondition(f"{what}: {error.strerror}") from None


# ---- its process ----


def _run(
    what: str, hook: Hook, program: str, told: bytes, main: Callable[[], None], flags: int
) -> None:
    try:
        _run_to_its_end(what, hook, program, told, main, flags)
    except OSError as error:
        reason = (
            f"{error.strerror}; does a limit or a filter of the container forbid what it needs?"
        )
        raise FailedPrecondition(f"{what}: cannot be run: {reason}") from error


def _run_to_its_end(
    what: str, hook: Hook, program: str, told: bytes, main: Callable[[], None], flags: int
) -> None:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    given = _memory(told)
    try:
        pid, pidfd = _fork(flags)
        if pid == 0:
            _become(hook, program, (given, writer), main)
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
        os.close(given)
    try:
        _watch(what, hook, pid, _Output(reader, pidfd))
    finally:
        os.close(reader)
        os.close(pidfd)


def _fork(flags: int) -> tuple[int, int]:
    """pid and pidfd. With a filter in force, by the call that every program makes: clone3(2) is often not in it."""
    if flags:
        return syscalls.clone3(flags)
    pid = os.fork()
    return (pid, os.pidfd_open(pid)) if pid else (0, -1)


def _memory(data: bytes) -> int:
    # Not a pipe: that would have to be written while the hook runs, if there is more than it holds (pipe(7)).
    memory = os.memfd_create("state", os.MFD_CLOEXEC)
    os.write(memory, data)
    os.lseek(memory, 0, os.SEEK_SET)
    return memory


def _become(hook: Hook, program: str, stdio: tuple[int, int], main: Callable[[], None]) -> NoReturn:
    try:
        os.setsid()
        _reset_signals()
        os.umask(_UMASK)
        main()
        given, output = stdio
        for number, descriptor in enumerate((given, output, output)):
            os.dup2(descriptor, number)
        syscalls.close_range(3)
        os.execve(program, hook["args"] or [hook["path"]], _environment(hook))
    except BaseException as error:  # noqa: BLE001 whoever waits for it must know
        text = error.strerror if isinstance(error, OSError) else repr(error)
        os.write(stdio[1], f"cannot be executed: {text}".encode(errors="replace"))
    finally:
        os._exit(_CANNOT_EXECUTE)


def _reset_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGPIPE, signal.SIGINT, signal.SIGCHLD, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _environment(hook: Hook) -> dict[str, str]:
    return dict(entry.split("=", 1) for entry in hook["env"] if "=" in entry)


def _watch(what: str, hook: Hook, pid: int, output: "_Output") -> None:
    """Wait until it has ended, its time is over, or it has written too much."""
    deadline = time.monotonic() + hook["timeout_ms"] / 1000
    while True:
        # In this order: what it wrote before its end is read for certain once the end is known.
        status = _ended(pid)
        output.read()
        if status is not None:
            break
        if output.bytes > MAX_OUTPUT_BYTES:
            _kill(pid)
            raise FailedPrecondition(f"{what}: has written more than {MAX_OUTPUT_BYTES} bytes")
        if time.monotonic() > deadline:
            _kill(pid)
            seconds = f"{hook['timeout_ms'] / 1000:g}"
            raise FailedPrecondition(f"{what}: has not ended within {seconds} s{output.tail()}")
        output.wait(deadline)
    if status:
        raise FailedPrecondition(f"{what}: {_described(status)}{output.tail()}")


def _ended(pid: int) -> int | None:
    """The wait status of waitpid(2); None while it runs."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return status if found else None


def _described(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"was killed by signal {os.WTERMSIG(status)}"
    return f"exit status {os.WEXITSTATUS(status)}"


def _kill(pid: int) -> None:
    """Kill it and wait for its end, but no longer than `_DEATH_MS`: it may be blocked in a file system."""
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + _DEATH_MS / 1000
    while _ended(pid) is None and time.monotonic() < deadline:
        time.sleep(_PAUSE_MS / 1000)


class _Output:
    """The output of a hook, of which the end is kept."""

    def __init__(self, reader: int, pidfd: int) -> None:
        os.set_blocking(reader, False)
        self._reader = reader
        self._pidfd = pidfd
        self._end = b""
        self._is_open = True
        self.bytes = 0

    def read(self) -> None:
        """Read what is there, and no more than a hook may write."""
        try:
            while self._is_open and self.bytes <= MAX_OUTPUT_BYTES:
                data = os.read(self._reader, _READ_BYTES)
                self._is_open = bool(data)
                self.bytes += len(data)
                self._end = (self._end + data)[-_TAIL_BYTES:]
        except BlockingIOError:
            pass

    def wait(self, deadline: float) -> None:
        """Wait until there is something, it has ended, or the time is over."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if self._is_open:
            poll.register(self._reader, select.POLLIN)
        poll.poll(max(0, deadline - time.monotonic()) * 1000 + 1)

    def tail(self) -> str:
        text = self._end.decode(errors="replace").strip()
        return f": {one_line(text)}" if text else ""
