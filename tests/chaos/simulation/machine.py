"""The simulated machine: processes, sockets, cgroups, links and files' faults, which no death of an agent takes away.

Each boundary of the agent is a *step*: there it can be killed, and there faults of the machine strike.
"""

import errno
import os
import select
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

from nodeagent.errors import ResourceExhausted
from tests.chaos.simulation.connection import Connection, Process
from tests.chaos.simulation.loop import Killed, Life, Loop

if TYPE_CHECKING:
    from tests.chaos.simulation.containers import Pod
    from tests.chaos.simulation.launcher import Launcher

EPOCH_NS = 1_700_000_000_000_000_000


@dataclass
class Truth:
    """What has really happened to a container. is_known: some process of ours has seen its end."""

    code: int | None = None
    is_known: bool = False


@dataclass
class Window:
    """Faults of a kind, from a moment to another one; each step fails with this probability."""

    kind: str
    until: float
    probability: float


class Machine:
    """Everything outside the agent."""

    def __init__(self, loop: Loop, random: Random, directory: str) -> None:
        self.loop = loop
        self.directory = directory  # of files, which is another one for each process
        self.random = random
        self.lines: list[str] = []
        self.is_traced = False
        self.digest = 0
        self.life: Life | None = None
        self.steps = 0
        self.kill_at = 0
        self.windows: list[Window] = []
        self.ticks = 0
        self.tokens = 0
        self.last_pid = 100
        self.boot = "boot-1"
        self.boots = 1
        self.processes: dict[int, Process] = {}
        self.listeners: dict[str, Process] = {}
        self.launcher: Launcher | None = None
        self.pods: dict[str, Pod] = {}
        self.pod_files: dict[str, Pod] = {}  # by directory
        self.exits: dict[tuple[str, str], dict[str, Any]] = {}
        self.truths: dict[str, Truth] = {}
        self.unwritten: set[str] = set()  # the keys of records whose last write has failed
        self.forgotten: set[str] = set()  # those of which that was so at a reboot
        self.asked: set[str] = set()  # pods and containers that a client has asked to end
        self.wrong = ""  # what happened to a process that should not
        self.groups: dict[str, Any] = {}
        self.links: dict[str, str] = {}
        self.addresses: dict[str, tuple[str, ...]] = {}
        self.tables: dict[str, set[Any]] = {}
        self.bridge = False
        self._files: dict[int, Any] = {}
        self._watched: dict[int, Process] = {}
        loop.on_reader = self._is_read

    # --- faults ---

    def trace(self, line: str) -> None:
        line = line.replace(self.directory, "")
        self.digest = hash((self.digest, self.loop.turns, line)) & 0xFFFFFFFFFFFFFFFF
        if self.is_traced:
            self.lines.append(f"{self.loop.time():9.4f} {line}")

    def step(self, what: str, path: str = "") -> None:
        """A boundary that the agent comes to. Raises `Killed`, or the fault that strikes."""
        if self.life is None or self.life.is_dead:
            raise Killed
        self.steps += 1
        if self.steps == self.kill_at:
            self.trace(f"agent killed at step {self.steps}: {what}")
            self.loop.kill(self.life)
            raise Killed
        if self.windows:
            self._strike(what, path)

    def _strike(self, what: str, path: str) -> None:
        now = self.loop.time()
        for window in self.windows:
            is_meant = now < window.until and what.startswith(window.kind.partition("_")[0])
            if is_meant and self.random.random() < window.probability:
                self.trace(f"fault {window.kind}: {what} {path}")
                raise self._error(window.kind, path)

    def _error(self, kind: str, path: str) -> Exception:
        if kind == "store":
            return ResourceExhausted("state.db: database or disk is full")
        if kind == "store_busy":
            return OSError(errno.EIO, "state.db: database is locked")
        number = self.random.choice((errno.ENOSPC, errno.EIO, errno.EMFILE, errno.ENOMEM))
        return OSError(number, os.strerror(number), path)

    def is_struck(self, kind: str) -> bool:
        """Whether a fault of a process strikes now."""
        now = self.loop.time()
        return any(
            now < window.until and window.kind == kind and self.random.random() < window.probability
            for window in self.windows
        )

    # --- time and tokens ---

    def time_ns(self) -> int:
        self.ticks += 1
        return EPOCH_NS + int(self.loop.time() * 1_000_000) * 1000 + self.ticks

    def token(self, count: int) -> str:
        self.tokens += 1
        return (
            f"{self.tokens * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF:016x}{self.tokens:0{2 * count - 16}x}"[
                -2 * count :
            ]
            if count >= 8
            else f"{self.tokens:0{2 * count}x}"
        )

    # --- the kernel's own work ---

    def drop_links(self) -> None:
        """Links go with the namespaces of their pods."""
        for name in [name for name, pod in self.links.items() if pod not in self.pods]:
            del self.links[name]
            self.addresses.pop(name, None)

    def remove_pod_files(self, directory: str) -> None:
        """A pod's directory is removed; its pins are mounts, which are in the way."""
        pod = self.pod_files.get(directory)
        if pod is None:
            return
        if pod.has_pins:
            raise OSError(errno.EBUSY, "Device or resource busy", directory)
        del self.pod_files[directory]
        for key in [key for key in self.exits if key[0] == directory]:
            del self.exits[key]

    def reboot(self) -> None:
        """Kill every process, and forget what is in memory."""
        self.boots += 1
        self.forgotten |= self.unwritten
        self.boot = f"boot-{self.boots}"
        for pod in list(self.pods.values()):
            for container in pod.containers.values():
                container.is_alive = False
            if pod.init is not None:
                pod.init.is_alive = False
        self.pods.clear()
        self.pod_files.clear()
        for process in list(self.processes.values()):
            process.kill()
        self.listeners.clear()
        self.exits.clear()
        self.groups.clear()
        self.links.clear()
        self.addresses.clear()
        self.tables.clear()
        self.bridge = False

    def _is_read(self, fd: int) -> None:
        if not self._is_ours(fd):
            self.poll_pipes()

    def poll_pipes(self) -> None:
        """Have the loop look at the agent's pipes, now and until they are read."""
        self.loop.after(self.loop.soon(), self._look_at_pipes)

    def _look_at_pipes(self) -> None:
        real = [fd for fd in self.loop.readers if fd not in self._files or not self._is_ours(fd)]
        if not real:
            return
        poll = select.poll()
        for fd in sorted(real):
            poll.register(fd, select.POLLIN)
        readable = [fd for fd, events in poll.poll(0) if not events & select.POLLNVAL]
        for fd in readable:
            self.loop.is_readable(fd)
        if readable:
            self.poll_pipes()

    # --- descriptors ---

    def _is_ours(self, fd: int) -> bool:
        try:
            return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"
        except OSError:
            return False

    def new_fd(self, file: Any) -> int:
        fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._files[fd] = file
        return fd

    def close_fd(self, fd: int) -> None:
        os.close(fd)

    def file_of(self, fd: int) -> Any:
        """What a descriptor of the agent is: an object of the simulation, or a copy of a real one."""
        file = self._files.get(fd)
        return file if file is not None and self._is_ours(fd) else os.dup(fd)

    def pidfd_open(self, pid: int, _flags: int = 0) -> int:
        self.step("pidfd_open")
        process = self.processes.get(pid)
        if process is None:
            raise ProcessLookupError(errno.ESRCH, "No such process")
        fd = self.new_fd(process)
        self._watched[fd] = process
        if not process.is_alive:
            self.loop.after(self.loop.soon(), lambda: self.tell_death(process))
        return fd

    def tell_death(self, process: Process) -> None:
        for fd, watched in list(self._watched.items()):
            if watched is process:
                self.loop.is_readable(fd)
        if not process.is_alive:
            self.loop.after(1.0, partial(self._reap, process))

    def _reap(self, process: Process) -> None:
        self.processes.pop(process.pid, None)

    def pidfd_send_signal(self, fd: int, number: int, *_: Any) -> None:
        self.step("kill")
        process = self._files.get(fd)
        if isinstance(process, Process) and number == 9:
            process.kill()

    def is_pidfd(self, fd: int) -> bool:
        return isinstance(self._files.get(fd), Process)

    def forget_descriptors(self) -> None:
        """Close what a dead agent had open."""
        for fd, file in list(self._files.items()):
            if self._is_ours(fd):
                os.close(fd)
            if isinstance(file, Connection):
                file.is_open = False
                file._close_files()
                self.loop.after(self.loop.soon(), file.left)
        self._files.clear()
        self._watched.clear()
