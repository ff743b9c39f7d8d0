"""Descriptors, states and handles that the agent exchanges with a supervisor."""

import asyncio
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from nodeagent.sandbox.agent.channel import Channel, Reply
from nodeagent.sandbox.spec import Exit, Identity


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupFds:
    """The open files of a cgroup; they stay the caller's.

    join: of v1, each hierarchy's `tasks`, for writing; of v2, the directory. oom: memory.events(.local) or
    memory.oom_control. procs: the list of pids. kill: cgroup.kill.
    """

    join: Sequence[int] = ()
    oom: int | None = None
    procs: int | None = None
    kill: int | None = None

    def named(self) -> list[tuple[str, int | None]]:
        watch = [("oom", self.oom), ("procs", self.procs), ("kill", self.kill)]
        return [*(("join", descriptor) for descriptor in self.join), *watch]


@dataclass(slots=True, kw_only=True)
class Namespaces:
    """The namespaces of a pod. net: of the network; route: a NETLINK_ROUTE socket inside it. Closed by `with`."""

    net: int
    route: socket.socket

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.net)
        self.route.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Created:
    """A container's process, ready to execute its program. warnings: what it could not be given."""

    pid: int
    identity: Identity
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerState:
    """The state of a container in its supervisor. Times are ns since the epoch, 0 for not yet.

    dropped_log_lines: what the log's disk had no room for. held_back_ms: how long it was not read from because of the
    limit of its log. Both since this supervisor is there.
    """

    id: str
    pid: int
    identity: Identity
    warnings: tuple[str, ...]
    started_at: int
    exit: Exit | None
    dropped_log_lines: int
    held_back_ms: int

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> Self:
        """The state that a supervisor's description has."""
        return cls(
            id=body["id"],
            pid=body["pid"],
            identity=body["identity"],
            warnings=tuple(body["warnings"]),
            started_at=body["started_at"],
            exit=body["exit"],
            dropped_log_lines=body["dropped_log_lines"],
            held_back_ms=body.get("held_back_ms", 0),  # a supervisor of an earlier version
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecIO:
    """Ends of pipes that the supervisor relays the process's streams from and to; no container has an end of them.

    None is the container's /dev/null. They stay the caller's. A terminal has stdin and stdout.
    """

    stdin: int | None = None
    stdout: int | None = None
    stderr: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecExit:
    """The end of an exec. code: 0-255, 128 + n for signal n; timed_out: it was killed at its time limit."""

    code: int
    timed_out: bool


@dataclass(slots=True)
class AttachIO:
    """The agent's ends of an attachment, not blocking, closed by `with`; a terminal has stdout only.

    stdin: None for a container that reads none. cut_off: set when the agent was too slow, and all output ended early.
    """

    stdin: int | None
    stdout: int | None
    stderr: int | None
    _end_input: Callable[[], None]
    _detach: Callable[[], None]
    cut_off: asyncio.Event = field(default_factory=asyncio.Event)

    def close_stdin(self) -> None:
        """End the input of this attachment; with stdin_once the container then reads the end of its own."""
        if self.stdin is not None:
            os.close(self.stdin)
            self.stdin = None
        self._end_input()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close_stdin()
        for descriptor in (self.stdout, self.stderr):
            if descriptor is not None:
                os.close(descriptor)
        self.stdout = self.stderr = None
        self._detach()


class ExecHandle:
    """A process that runs in a container."""

    def __init__(
        self, channel: Channel, number: int, reply: Reply, end: "asyncio.Future[ExecExit | None]"
    ) -> None:
        self.pid: int = reply.result["pid"]
        self._channel = channel
        self._number = number
        self._end = end

    async def wait(self) -> ExecExit:
        """Wait for the end of the process. Raises Unavailable when the supervisor dies first."""
        end = await asyncio.shield(self._end)
        if end is None:
            raise self._channel.unavailable()
        return end

    async def resize(self, width: int, height: int) -> None:
        await self._channel.request("exec_resize", exec=self._number, width=width, height=height)
