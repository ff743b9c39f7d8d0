"""ExecSync: a command in a running container, its output captured up to a bound.

The command has a cgroup of its own, so that its whole tree is killed when its time is over. A child that keeps the
pipe open after the command has ended does not delay the reply.
"""

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from nodeagent.cgroups.group import Cgroup
from nodeagent.errors import NodeAgentError
from nodeagent.lifecycle.plan import execs
from nodeagent.lifecycle.supervisors.cgroup_files import supervisor_files
from nodeagent.records import Container
from nodeagent.sandbox.agent.client import ExecIO, Supervisor
from nodeagent.sandbox.spec import ExecPlan

MAX_OUTPUT_BYTES = 16 << 20
READ_BYTES = 1 << 16
KILL_PATIENCE_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecResult:
    """The output of the command, at most MAX_OUTPUT_BYTES of each stream, and its exit code (128 + n for signal n)."""

    stdout: bytes
    stderr: bytes
    exit_code: int


async def exec_sync(
    supervisor: Supervisor,
    group: Cgroup,
    container: Container,
    argv: tuple[str, ...],
    timeout_s: float,
) -> ExecResult:
    """Run a command to its end. timeout_s 0 is no limit; raises TimeoutError when it is over, with the tree killed.

    The supervisor kills it in time; a process that cannot be killed, in a frozen container, is not waited for.
    """
    plan = execs.plan(container, argv, timeout_s=timeout_s)
    try:
        async with asyncio.timeout(timeout_s + KILL_PATIENCE_SECONDS if timeout_s else None):
            return await _run(supervisor, group, plan)
    except TimeoutError:
        raise TimeoutError(
            f'container "{container.id}": {argv[0]!r} ran longer than {timeout_s:g} s'
        ) from None


async def _run(supervisor: Supervisor, group: Cgroup, plan: ExecPlan) -> ExecResult:
    child = execs.new_group(group)
    try:
        with Capture.open() as stdout, Capture.open() as stderr, supervisor_files(child) as fds:
            streams = ExecIO(stdin=None, stdout=stdout.writer, stderr=stderr.writer)
            try:
                command = await supervisor.exec(plan, streams, fds)
                stdout.start()
                stderr.start()
                end = await command.wait()
            except asyncio.CancelledError:
                # Not through the supervisor: it may itself be blocked by the command, in a pipe that this one holds.
                with suppress(NodeAgentError, OSError):  # a group that went with its container
                    await asyncio.to_thread(child.kill)
                raise
            stdout.drain()
            stderr.drain()
    finally:
        await asyncio.to_thread(group.discard, child)
    if end.timed_out:
        raise TimeoutError
    return ExecResult(stdout=stdout.data, stderr=stderr.data, exit_code=end.code)


class Capture:
    """The reading end of a pipe. Output beyond the bound is read and discarded, so that the command goes on.

    The other end is the supervisor's, not the command's: with a pipe of its own a command could block the agent.
    """

    def __init__(self, reader: int, writer: int) -> None:
        self.writer = writer
        self._reader = reader
        self._chunks: list[bytes] = []
        self._room = MAX_OUTPUT_BYTES

    @classmethod
    @contextmanager
    def open(cls) -> "Iterator[Capture]":
        reader, writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(reader, False)
        capture = cls(reader, writer)
        try:
            yield capture
        finally:
            capture._close()

    @property
    def data(self) -> bytes:
        return b"".join(self._chunks)

    def start(self) -> None:
        """Close our copy of the writing end (the supervisor has its own) and read as data comes."""
        os.close(self.writer)
        self.writer = -1
        asyncio.get_running_loop().add_reader(self._reader, self._read)

    def drain(self) -> None:
        """Take what the pipe holds now; never wait for its end."""
        while self._read():
            pass

    def _read(self) -> bool:
        if self._reader < 0:
            return False
        try:
            data = os.read(self._reader, READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._stop()
            return False
        if self._room:
            self._chunks.append(data[: self._room])
            self._room -= len(self._chunks[-1])
        return True

    def _stop(self) -> None:
        asyncio.get_running_loop().remove_reader(self._reader)
        os.close(self._reader)
        self._reader = -1

    def _close(self) -> None:
        if self.writer >= 0:
            os.close(self.writer)
        if self._reader >= 0:
            self._stop()
