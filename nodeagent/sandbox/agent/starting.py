"""Start of the launcher: with exec from a sealed copy of the interpreter, in a session of its own."""

import asyncio
import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from nodeagent.errors import AlreadyExists, Unavailable
from nodeagent.sandbox.agent.interpreter import sealed_copy
from nodeagent.sandbox.paths import LAUNCHER_READY

log = logging.getLogger(__name__)

_LOG = "launcher.log"
_PATIENCE_SECONDS = 30.0
_PACKAGE_ROOT = str(Path(__file__).parents[3])
_BOOTSTRAP = (
    "import sys; root, state, *fds = sys.argv[1:]; sys.path.insert(0, root); "
    "from nodeagent.sandbox.launcher.main import main; main(state, *map(int, fds))"
)


async def start_launcher(state: str, python: str, join: Sequence[int]) -> None:
    """Start a launcher; returns when it listens. Raises AlreadyExists where there is one, Unavailable if it fails."""
    executable, copy = await asyncio.to_thread(_copy, python)
    try:
        answer = await _try_start(f"/proc/self/fd/{copy}", state, python, join)
    except (
        OSError
    ) as error:  # a policy of the node may forbid to execute what is not in a file system
        log.warning("cannot execute a sealed copy of the interpreter: %s", error.strerror)
        answer = b""
    finally:
        os.close(copy)
    if not answer:
        # An interpreter that finds its libraries relative to itself cannot be run from a copy.
        log.warning("%s: cannot be run from a sealed copy; containers may reach it", executable)
        answer = await _try_start(executable, state, python, join)
    if answer != LAUNCHER_READY:
        text = answer.decode(errors="replace")
        text = text or f"launcher: ended before it was ready, see {state}/{_LOG}"
        raise AlreadyExists(text) if "has a launcher" in text else Unavailable(text)


def _copy(python: str) -> tuple[str, int]:
    executable = os.path.realpath(python)
    return executable, sealed_copy(executable)


async def _try_start(executable: str, state: str, python: str, join: Sequence[int]) -> bytes:
    """Start it; returns what it writes when it is ready, or why it cannot be, or nothing if it just ends."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        try:
            pid = await asyncio.to_thread(_spawn, executable, state, python, writer, join)
        finally:
            os.close(writer)
        try:
            answer = await _read(reader)
        except TimeoutError:
            # Not only given up: it would go on beside the one that the next attempt starts.
            os.kill(pid, signal.SIGKILL)
            await asyncio.to_thread(os.waitpid, pid, 0)
            text = f"launcher: not ready within {_PATIENCE_SECONDS:g} s, see {state}/{_LOG}"
            raise Unavailable(text) from None
    finally:
        os.close(reader)
    if answer != LAUNCHER_READY:
        await asyncio.to_thread(os.waitpid, pid, 0)
    return answer


def _spawn(executable: str, state: str, python: str, ready: int, join: Sequence[int]) -> int:
    """Spawn it. The descriptors `ready` and `join` keep their numbers; the launcher closes all others."""
    given = [str(fd) for fd in (ready, *join)]
    log_flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    return os.posix_spawn(
        executable,
        [python, "-I", "-S", "-X", "utf8", "-c", _BOOTSTRAP, _PACKAGE_ROOT, state, *given],
        {},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0),
            (os.POSIX_SPAWN_DUP2, 0, 1),
            (os.POSIX_SPAWN_OPEN, 2, f"{state}/{_LOG}", log_flags, 0o600),
            # To itself: a spawn clears close-on-exec by that (posix_spawn_file_actions_adddup2(3p), glibc 2.29).
            *((os.POSIX_SPAWN_DUP2, fd, fd) for fd in (ready, *join)),
        ],
        setsid=True,
        setsigmask=[],
    )


async def _read(reader: int) -> bytes:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(reader, readable.set)
    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            await readable.wait()
        return os.read(reader, 4096)
    finally:
        loop.remove_reader(reader)
