"""A process that an agent can connect to, and the connection."""

import errno
import json
import os
import socket
import struct
from array import array
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.chaos.simulation.machine import Machine

ROOM = 64  # messages that a connection holds


class Process:
    """A process that listens, can die, and can stop for a while, as of SIGSTOP."""

    def __init__(self, machine: "Machine", name: str) -> None:
        machine.last_pid += 1
        self.machine = machine
        self.name = name
        self.pid = machine.last_pid
        self.is_alive = True
        self.connections: list[Connection] = []
        self._stops_until = 0.0
        self._waiting: deque[Callable[[], None]] = deque()  # what it does when it goes on
        machine.processes[self.pid] = self
        machine.trace(f"{name} {self.pid} begins")

    def kill(self) -> None:
        """End at once, as of SIGKILL: connections close first, somewhat later the pidfd tells it."""
        if not self.is_alive:
            return
        self.is_alive = False
        self.machine.trace(f"{self.name} {self.pid} ends")
        machine = self.machine
        self._stops_until = 0.0
        self._waiting.clear()
        for connection in self.connections:
            connection.close_by_process()
        self.connections.clear()
        for path in [path for path, process in machine.listeners.items() if process is self]:
            del machine.listeners[path]
        machine.loop.after(machine.loop.soon(), lambda: machine.tell_death(self))
        self.died()

    def died(self) -> None:
        """For subclasses."""

    # --- SIGSTOP ---

    @property
    def is_stopped(self) -> bool:
        return self._stops_until > self.machine.loop.time()

    def stop_for(self, seconds: float) -> None:
        self._stops_until = max(self._stops_until, self.machine.loop.time() + seconds)
        self.machine.loop.after(seconds, self._go_on)

    def _go_on(self) -> None:
        if self.is_stopped or not self.is_alive:
            return
        self.machine.trace(f"{self.name} {self.pid} goes on")
        while self._waiting:
            self._waiting.popleft()()
        for connection in list(self.connections):
            connection.deliver_all()

    def when_running(self, callback: Callable[[], None]) -> None:
        """Do it now, or when this process goes on; never if it dies before."""
        if self.is_stopped:
            self._waiting.append(callback)
        elif self.is_alive:
            callback()

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Do something later if this process lives then."""
        self.machine.loop.after(seconds, lambda: self.when_running(callback))

    # --- connections ---

    def accepted(self, connection: "Connection") -> None:
        """For subclasses: an agent has connected."""

    def received(self, connection: "Connection", message: dict[str, Any], files: list[Any]) -> None:
        raise NotImplementedError


class Connection:
    """A SOCK_SEQPACKET connection between an agent and a process; messages arrive in order, each after a time."""

    def __init__(self, machine: "Machine", process: Process) -> None:
        self.machine = machine
        self.process = process
        self.fd = machine.new_fd(self)
        self.to_process: deque[tuple[bytes, list[Any]]] = deque()
        self.arrived: deque[tuple[bytes, list[int]] | None] = deque()
        self.is_open = True  # the agent's end
        self.is_served = True
        process.connections.append(self)

    # the socket, as the agent uses it

    def fileno(self) -> int:
        return self.fd

    def setblocking(self, _flag: bool) -> None:
        """It never blocks."""

    def getsockopt(self, *_: int) -> bytes:
        return struct.pack("3i", self.process.pid, 0, 0)

    def sendmsg(self, buffers: list[bytes], ancillary: list[Any], _flags: int = 0) -> int:
        self.machine.step("send")
        if not self.is_served:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        if len(self.to_process) >= ROOM:
            raise BlockingIOError(errno.EAGAIN, "no room")
        fds = [fd for _, _, numbers in ancillary for fd in array("i", numbers)]
        self.to_process.append((buffers[0], [self.machine.file_of(fd) for fd in fds]))
        loop = self.machine.loop
        loop.after(loop.soon(), self._deliver)
        return len(buffers[0])

    def recvmsg(self, *_: int) -> tuple[bytes, list[Any], int, None]:
        if self.machine.is_struck("receive_fails"):
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        if not self.arrived:
            raise BlockingIOError(errno.EAGAIN, "nothing there")
        message = self.arrived[0]
        if message is None:
            return b"", [], 0, None
        self.arrived.popleft()
        packet, fds = message
        if self.machine.is_struck("cut"):
            return self._cut(packet, fds)
        return packet, [(1, 1, array("i", fds).tobytes())] if fds else [], 0, None

    def _cut(self, packet: bytes, fds: list[int]) -> tuple[bytes, list[Any], int, None]:
        """The message without its descriptors, for which the agent has no room, or without its end."""
        self.machine.trace(f"cut: {len(packet)} bytes, {len(fds)} descriptors")
        for fd in fds:
            os.close(fd)
        if fds:
            return packet, [], socket.MSG_CTRUNC, None
        return packet[: len(packet) // 2], [], socket.MSG_TRUNC, None

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self.machine.loop.remove_reader(self.fd)
            self.machine.close_fd(self.fd)
            self._close_files()
            loop = self.machine.loop
            loop.after(loop.soon(), self.left)

    def _close_files(self) -> None:
        for waiting in self.arrived:
            for fd in waiting[1] if waiting else ():
                os.close(fd)
        self.arrived.clear()

    # the other end

    def left(self) -> None:
        """The agent has closed it: the process reads what was sent before."""
        if self.process.is_stopped:
            self.process.when_running(self.left)
            return
        self.deliver_all()
        if self in self.process.connections:
            self.process.connections.remove(self)
        self.is_served = False

    def deliver_all(self) -> None:
        while self.to_process:
            self._deliver()

    def _deliver(self) -> None:
        if not self.to_process or self.process.is_stopped:
            return
        was_full = len(self.to_process) >= ROOM
        packet, files = self.to_process.popleft()
        if was_full and self.is_open:
            self.machine.loop.is_writable(self.fd)
        if self.process.is_alive and self.is_served:
            self.process.received(self, json.loads(packet), files)
        else:
            for file in files:
                close_file(file)

    def drop_unread(self) -> None:
        for _, files in self.to_process:
            for file in files:
                close_file(file)
        self.to_process.clear()

    def send(self, packet: bytes, fds: list[int] | None = None) -> None:
        """Send to the agent. fds: given away. A message that cannot be sent ends the connection (`runtime.peers`)."""
        if self.is_served and self.machine.is_struck("send_fails"):
            self.machine.trace(f"{self.process.name} cannot send")
            self.close_by_process()
        if not self.is_open or not self.is_served:
            for fd in fds or ():
                os.close(fd)
            return
        self._on_its_way((packet, fds or []))

    def _on_its_way(self, message: tuple[bytes, list[int]] | None) -> None:
        """It is there at once; the agent wakes up for it somewhat later."""
        self.arrived.append(message)
        loop = self.machine.loop
        loop.after(loop.soon(), self._arrive)

    def _arrive(self) -> None:
        if self.arrived and self.is_open:
            self.machine.loop.is_readable(self.fd)

    def close_by_process(self) -> None:
        if self.is_served:
            self.is_served = False
            self.drop_unread()
            if self.is_open:
                self._on_its_way(None)


def close_file(file: Any) -> None:
    """Close a copy of a real descriptor; other files are objects of the simulation."""
    if isinstance(file, int):
        os.close(file)
