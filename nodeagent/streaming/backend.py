"""The requests to the streaming server, and the interface to the processes that its sessions are about.

Requests are checked when their ticket is issued; the lifecycle implements `Backend` and `Process`. Descriptors that
cross this interface are non-blocking, close-on-exec, and belong to the session from then on.
"""

import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Protocol

from nodeagent.errors import InvalidArgument

MAX_PORT = (1 << 16) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandRequest:
    """A request for streams of a process in a container."""

    path: ClassVar[str]

    container_id: str
    tty: bool = False
    stdin: bool = False
    stdout: bool = False
    stderr: bool = False

    def check(self) -> None:
        """Raise InvalidArgument for what no session could serve."""
        if not self.container_id:
            raise InvalidArgument("container_id: is empty")
        if self.tty and self.stderr:
            raise InvalidArgument(
                "stderr: a terminal has one output, tty and stderr exclude each other"
            )
        if not (self.stdin or self.stdout or self.stderr):
            raise InvalidArgument("stdin, stdout, stderr: at least one is needed")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecRequest(CommandRequest):
    """A request for a new process in a running container."""

    path = "exec"

    command: tuple[str, ...]

    def check(self) -> None:
        CommandRequest.check(self)
        if not self.command:
            raise InvalidArgument("cmd: is empty")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachRequest(CommandRequest):
    """A request for the streams of a running container's first process; tty is as the container has it."""

    path = "attach"


@dataclass(frozen=True, slots=True, kw_only=True)
class PortForwardRequest:
    """A request for TCP connections into a pod. ports: for the old WebSocket channels, others name a port each time."""

    path: ClassVar[str] = "portforward"

    sandbox_id: str
    ports: tuple[int, ...] = ()

    def check(self) -> None:
        """Raise InvalidArgument for what no session could serve."""
        if not self.sandbox_id:
            raise InvalidArgument("pod_sandbox_id: is empty")
        _check_ports(self.ports)


Request = ExecRequest | AttachRequest | PortForwardRequest


def _check_ports(ports: Iterable[int]) -> None:
    for port in ports:
        if not 1 <= port <= MAX_PORT:
            raise InvalidArgument(f"port: {port} is not between 1 and {MAX_PORT}")


class Process(Protocol):
    """A process, new or attached to, as one session uses it.

    A stream that was not asked for, or that the process does not have, is None. With a terminal, stdout is all of its
    output. The three descriptors are different numbers.
    """

    @property
    def stdin(self) -> int | None: ...

    @property
    def stdout(self) -> int | None: ...

    @property
    def stderr(self) -> int | None: ...

    def resize(self, width: int, height: int) -> None:
        """Give the terminal this many columns and rows. OSError: the terminal is gone."""

    def end_stdin(self) -> None:
        """Note the end of the client's input: all of it is in `stdin`, which is closed by now.

        A process of exec sees end of file by that alone. Attach ends the container's stdin here if it is
        ``stdin_once`` and no terminal; otherwise the client has left.
        """

    async def wait(self) -> int:
        """Wait for the end of the process and return its exit code, 128 + n for signal n.

        For attach it is the container's, or 0 when the client has left before.
        """

    async def close(self) -> None:
        """End the session, whether the process has ended or not; the three descriptors are closed already."""


class Backend(Protocol):
    """The interface to containers and pods. The texts of NodeAgentError and OSError are sent to the client.

    A call is cancelled when its client leaves meanwhile, and must leave nothing behind then.
    """

    async def exec(self, request: ExecRequest, size: tuple[int, int] | None) -> Process:
        """Start a process; size is its terminal's, width and height, before it runs."""

    async def attach(self, request: AttachRequest) -> Process:
        """Attach to the container's first process; stdout and stderr have what it writes from now on."""

    async def dial(self, request: PortForwardRequest, port: int) -> socket.socket:
        """Connect to the port of 127.0.0.1, else of ::1, in the pod's network namespace: a non-blocking TCP socket."""
