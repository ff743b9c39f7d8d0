"""Sessions of streaming clients: commands in containers, containers themselves, and ports of pods.

Descriptors go to the session, which closes them. A command outlives its session unless the loss of its streams ends it;
its cgroup is removed when it has ended.
"""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import suppress
from functools import partial
from typing import Any

from nodeagent.cgroups.group import Cgroup
from nodeagent.errors import (
    FailedPrecondition,
    NodeAgentError,
    ResourceExhausted,
    Unavailable,
)
from nodeagent.lifecycle.containers.containers import Containers
from nodeagent.lifecycle.containers.groups import Groups
from nodeagent.lifecycle.inventory import Inventory
from nodeagent.lifecycle.plan import execs
from nodeagent.lifecycle.supervisors.cgroup_files import close_all, supervisor_files
from nodeagent.lifecycle.supervisors.supervision import Supervision
from nodeagent.sandbox.agent.client import AttachIO, CgroupFds, ExecHandle, ExecIO, Supervisor
from nodeagent.sandbox.spec import ExecPlan
from nodeagent.streaming.backend import AttachRequest, ExecRequest, PortForwardRequest, Process
from nodeagent.tasks import Tasks

Size = tuple[int, int]

# From the end of a supervisor to that of its containers, as far as they end with it.
_END_SECONDS = 1.0


class Sessions:
    """The backend of the streaming server."""

    def __init__(
        self,
        inventory: Inventory,
        containers: Containers,
        groups: Groups,
        supervision: Supervision,
        tasks: Tasks,
    ) -> None:
        self._inventory = inventory
        self._containers = containers
        self._groups = groups
        self._supervision = supervision
        self._tasks = tasks.part()

    async def exec(self, request: ExecRequest, size: Size | None) -> Process:
        """Start a command in a running container, in a cgroup of its own."""
        container, supervisor = self._containers.running(request.container_id)
        whole = self._groups.of(container)
        group = execs.new_group(whole)
        try:
            with supervisor_files(group) as fds:
                plan = execs.plan(container, request.command, tty=request.tty)
                command = await _run(self, supervisor, request, plan, fds, size)
        except BaseException:
            await asyncio.to_thread(whole.discard, group)
            raise
        self.do_behind("exec cleanup", _remove_after(command.handle, whole, group))
        return command

    async def attach(self, request: AttachRequest) -> Process:
        """Attach to the first process of a container, from now on."""
        container, supervisor = self._containers.running(request.container_id)
        streams = await supervisor.attach(container.id)
        last = container.config.stdin_once and not request.tty
        return Attached(self, supervisor, request, streams, input_ends_once=last)

    async def dial(self, request: PortForwardRequest, port: int) -> socket.socket:
        """A connection to 127.0.0.1, else ::1, as the pod sees it."""
        pod = self._inventory.pods.get(request.sandbox_id)
        if pod is None or pod.supervisor is None:
            raise FailedPrecondition(f'pod sandbox "{request.sandbox_id}": is stopped')
        return await pod.supervisor.dial(port)

    async def end_of(self, container_id: str) -> int:
        """The exit code of a container, once it has ended."""
        await self._supervision.ended(container_id)
        container = self._inventory.containers.get(container_id)
        return container.exit_code if container else 0

    def do_behind(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Do work in the background, in a task of this name."""
        self._tasks.run(name, work)

    async def close(self) -> None:
        """Leave the commands that still run to their supervisors."""
        await self._tasks.close()


# --- commands ---


class Command:
    """A new process. The output of its terminal, if it has one, is `stdout`."""

    def __init__(
        self,
        sessions: Sessions,
        handle: ExecHandle,
        stdin: int | None,
        stdout: int | None,
        stderr: int | None,
    ) -> None:
        self._sessions = sessions
        self.handle = handle
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr

    def resize(self, width: int, height: int) -> None:
        self._sessions.do_behind("resize", _resize(partial(self.handle.resize, width, height)))

    def end_stdin(self) -> None:
        """Do nothing: a command only needs the end of the pipe."""

    async def wait(self) -> int:
        return (await self.handle.wait()).code

    async def close(self) -> None:
        """Do nothing: the command goes on without its streams; with a terminal its supervisor sends SIGHUP."""


async def _resize(resize: Callable[[], Awaitable[None]]) -> None:
    with suppress(NodeAgentError, OSError):  # the process has ended meanwhile
        await resize()


async def _run(
    sessions: Sessions,
    supervisor: Supervisor,
    request: ExecRequest,
    plan: ExecPlan,
    fds: CgroupFds,
    size: Size | None,
) -> Command:
    """Start the command with pipes of the agent for its streams.

    A terminal's output is read in any case: its programs would block otherwise.
    """
    wanted = request.stdin, request.stdout or request.tty, request.stderr
    (their_stdin, stdin), (stdout, their_stdout), (stderr, their_stderr) = _pipes(wanted)
    ours, theirs = (stdin, stdout, stderr), (their_stdin, their_stdout, their_stderr)
    for fd in ours:
        if fd is not None:
            os.set_blocking(fd, False)
    streams = ExecIO(stdin=their_stdin, stdout=their_stdout, stderr=their_stderr)
    try:
        handle = await supervisor.exec(plan, streams, fds, size)
    except BaseException:
        close_all(ours)
        raise
    finally:
        close_all(theirs)
    return Command(sessions, handle, *ours)


def _pipes(wanted: Iterable[bool]) -> list[tuple[int | None, int | None]]:
    """The reading and the writing end of a pipe for each that is wanted; if one cannot be made, none is left open."""
    pipes: list[tuple[int | None, int | None]] = []
    try:
        pipes.extend(os.pipe2(os.O_CLOEXEC) if one else (None, None) for one in wanted)
    except OSError:
        close_all(end for pipe in pipes for end in pipe)
        raise
    return pipes


async def _remove_after(handle: ExecHandle, whole: Cgroup, group: Cgroup) -> None:
    try:
        await handle.wait()
    except NodeAgentError:
        return  # its supervisor died: the group goes with the container's
    await asyncio.to_thread(whole.discard, group)


# --- attaching ---


class Attached:
    """A container's first process, shared with its log and with other clients.

    The end of a client's input is the container's if that reads one input only. Otherwise it detaches the client: it is
    all that crictl sends when a user types the keys to detach.
    """

    def __init__(
        self,
        sessions: Sessions,
        supervisor: Supervisor,
        request: AttachRequest,
        streams: AttachIO,
        *,
        input_ends_once: bool,
    ) -> None:
        self._sessions = sessions
        self._supervisor = supervisor
        self._container_id = request.container_id
        self._streams = streams
        self._input_ends_once = input_ends_once
        self._left = asyncio.Event()
        self.stdin = streams.stdin if request.stdin else None
        self.stdout = streams.stdout if request.stdout else None
        self.stderr = streams.stderr if request.stderr else None
        close_all(set(_of(streams)) - set(_of(self)))
        streams.stdin = streams.stdout = streams.stderr = None

    def resize(self, width: int, height: int) -> None:
        resize = partial(self._supervisor.resize, self._container_id, width, height)
        self._sessions.do_behind("resize", _resize(resize))

    def end_stdin(self) -> None:
        self._streams.close_stdin()
        if not self._input_ends_once:
            self._left.set()

    async def wait(self) -> int:
        """Wait until the container has ended, or this client is not attached any more.

        A successor of the supervisor, or the next connection to it, has none of its attachments.
        """
        async with Tasks() as tasks:
            end = tasks.start("end", self._sessions.end_of(self._container_id))
            left = tasks.start("leaving", self._left.wait())
            cut_off = tasks.start("cut-off", self._streams.cut_off.wait())
            lost = tasks.start("loss", self._supervisor.ended.wait())
            await asyncio.wait((end, left, cut_off, lost), return_when=asyncio.FIRST_COMPLETED)
            if lost.done():  # the container may have ended with its pod
                await asyncio.wait((end,), timeout=_END_SECONDS)
        if not end.cancelled():
            return end.result()
        if not left.cancelled():
            return 0
        about = f'container "{self._container_id}"'
        if not cut_off.cancelled():
            raise ResourceExhausted(f"{about}: its output was read too slowly")
        raise Unavailable(f"{about}: the connection to its supervisor has ended; attach again")

    async def close(self) -> None:
        with self._streams:
            pass


def _of(streams: AttachIO | Attached) -> tuple[int | None, ...]:
    return streams.stdin, streams.stdout, streams.stderr
