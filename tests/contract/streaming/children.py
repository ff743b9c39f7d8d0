"""A backend of plain children of the test: their pipes, their terminals, and loopback as the pod's network."""

import asyncio
import fcntl
import os
import pty
import signal
import socket
import struct
import termios
from contextlib import suppress
from dataclasses import dataclass, field

from nodeagent.errors import FailedPrecondition, NotFound
from nodeagent.streaming.backend import AttachRequest, ExecRequest, PortForwardRequest, Process


def pipe_to_child() -> tuple[int, int]:
    """The child's reading end, and ours, non-blocking."""
    theirs, ours = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(ours, False)
    return theirs, ours


def pipe_from_child() -> tuple[int, int]:
    """The child's writing end, and ours, non-blocking."""
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(ours, False)
    return theirs, ours


def nothing() -> tuple[int, None]:
    """A stream that was not asked for."""
    return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC), None


def set_size(fd: int, width: int, height: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))


def _own_terminal() -> None:
    for number in (signal.SIGINT, signal.SIGHUP):  # who runs in the background may ignore them
        signal.signal(number, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@dataclass(kw_only=True)
class Child:
    """A process of exec."""

    process: asyncio.subprocess.Process
    stdin: int | None = None
    stdout: int | None = None
    stderr: int | None = None
    terminal: int | None = None
    stdin_ended: bool = False
    closed: bool = False

    def resize(self, width: int, height: int) -> None:
        assert self.terminal is not None
        set_size(self.terminal, width, height)

    def end_stdin(self) -> None:
        self.stdin_ended = True

    async def wait(self) -> int:
        code = await self.process.wait()
        return code if code >= 0 else 128 - code

    async def close(self) -> None:
        self.closed = True
        if self.terminal is not None:
            os.close(self.terminal)


async def spawn(command: tuple[str, ...], request: ExecRequest) -> Child:
    """A child with a pipe for each stream that was asked for."""
    theirs_in, stdin = pipe_to_child() if request.stdin else nothing()
    theirs_out, stdout = pipe_from_child() if request.stdout else nothing()
    theirs_err, stderr = pipe_from_child() if request.stderr else nothing()
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=theirs_in, stdout=theirs_out, stderr=theirs_err, start_new_session=True
        )
    except OSError:
        for fd in (stdin, stdout, stderr):
            if fd is not None:
                os.close(fd)
        raise
    finally:
        for fd in (theirs_in, theirs_out, theirs_err):
            os.close(fd)
    return Child(process=process, stdin=stdin, stdout=stdout, stderr=stderr)


async def spawn_on_terminal(
    command: tuple[str, ...], request: ExecRequest, size: tuple[int, int] | None
) -> Child:
    """A child whose terminal has its size before it runs."""
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    if size is not None:
        set_size(master, *size)
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=_own_terminal,
    )
    os.close(slave)
    return Child(
        process=process,
        terminal=master,
        stdin=os.dup(master) if request.stdin else None,
        stdout=os.dup(master),
    )


@dataclass(kw_only=True)
class Attachment:
    """One client of a running container."""

    container: "Container"
    once: bool
    writers: list[tuple[int, int]] = field(default_factory=list)
    stdin: int | None = None
    stdout: int | None = None
    stderr: int | None = None
    left: asyncio.Event = field(default_factory=asyncio.Event)

    def resize(self, width: int, height: int) -> None:
        raise OSError("no terminal")

    def end_stdin(self) -> None:
        if self.once:
            self.container.end_stdin()
        else:
            self.left.set()

    async def wait(self) -> int:
        ends = {asyncio.create_task(self.left.wait()), asyncio.create_task(self.container.wait())}
        done, pending = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for waiter in pending:
            waiter.cancel()
        return 0 if self.left.is_set() else int(done.pop().result())

    async def close(self) -> None:
        self.container.detach(self)


class Container:
    """A running process whose output goes to every client that is attached at that moment."""

    def __init__(self, process: asyncio.subprocess.Process, *, stdin_once: bool) -> None:
        self.process = process
        self.attachments: list[Attachment] = []
        self._writers: dict[int, list[int]] = {1: [], 2: []}
        self._stdin_once = stdin_once
        self._pumps = [
            asyncio.create_task(self._pump(1, process.stdout)),
            asyncio.create_task(self._pump(2, process.stderr)),
        ]

    def attach(self, request: AttachRequest) -> Attachment:
        attachment = Attachment(container=self, once=self._stdin_once)
        if request.stdin:
            assert self.process.stdin is not None
            raw = self.process.stdin.get_extra_info("pipe").fileno()
            attachment.stdin = os.dup(raw)
        for number, name in ((1, "stdout"), (2, "stderr")):
            if getattr(request, name):
                writer, ours = pipe_from_child()
                setattr(attachment, name, ours)
                self._writers[number].append(writer)
                attachment.writers.append((number, writer))
        self.attachments.append(attachment)
        return attachment

    def detach(self, attachment: Attachment) -> None:
        self.attachments.remove(attachment)
        for number, writer in attachment.writers:
            if writer in self._writers[number]:
                self._writers[number].remove(writer)
                os.close(writer)

    def end_stdin(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    async def wait(self) -> int:
        code = await self.process.wait()
        return code if code >= 0 else 128 - code

    async def _pump(self, number: int, reader: asyncio.StreamReader | None) -> None:
        assert reader is not None
        while data := await reader.read(1 << 16):
            for fd in self._writers[number]:
                with suppress(BrokenPipeError):
                    os.write(fd, data)
        while self._writers[number]:
            os.close(self._writers[number].pop())

    async def close(self) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()
        await asyncio.gather(*self._pumps)


@dataclass
class Children:
    """The backend. Containers are known by name; exec needs none."""

    containers: dict[str, Container] = field(default_factory=dict)
    execs: list[Child] = field(default_factory=list)
    sizes: list[tuple[int, int] | None] = field(default_factory=list)
    dials: list[int] = field(default_factory=list)

    async def run(self, name: str, *command: str, stdin_once: bool = False) -> Container:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, stderr=pipe
        )
        self.containers[name] = Container(process, stdin_once=stdin_once)
        return self.containers[name]

    async def exec(self, request: ExecRequest, size: tuple[int, int] | None) -> Process:
        if request.container_id == "stopped":
            raise FailedPrecondition('container "stopped": not running')
        self.sizes.append(size)
        if request.tty:
            child = await spawn_on_terminal(request.command, request, size)
        else:
            child = await spawn(request.command, request)
        self.execs.append(child)
        return child

    async def attach(self, request: AttachRequest) -> Process:
        if request.container_id not in self.containers:
            raise NotFound(f'container "{request.container_id}": not found')
        return self.containers[request.container_id].attach(request)

    async def dial(self, request: PortForwardRequest, port: int) -> socket.socket:
        self.dials.append(port)
        target = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        target.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(target, ("127.0.0.1", port))
        except BaseException:
            target.close()
            raise
        return target

    async def close(self) -> None:
        for container in self.containers.values():
            await container.close()
        for child in self.execs:
            with suppress(ProcessLookupError):
                os.killpg(child.process.pid, signal.SIGKILL)
            await child.process.wait()
