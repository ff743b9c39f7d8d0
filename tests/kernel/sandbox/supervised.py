"""A launcher with its supervisors, in a state directory of its own, and containers in their pods."""

import asyncio
import os
import secrets
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from nodeagent.cgroups.group import Cgroup
from nodeagent.linux import libseccomp, syscalls
from nodeagent.sandbox.agent.client import CgroupFds, ExecHandle, ExecIO, Launcher, Supervisor
from nodeagent.sandbox.spec import ContainerPlan, ExecPlan, Exit, PodPlan, PodSettings
from tests.kernel.sandbox.containers import container_plan

ALL = ("net", "ipc", "uts")
NO_CGROUP = CgroupFds()


class UnfinishedLineError(Exception):
    """A log that ends in the middle of a line: it is being written, or what wrote it is at fault."""


class Node:
    """Where the launcher's state is; `launcher` is the one of now."""

    def __init__(self, directory: Path, layer: Path) -> None:
        self.directory = directory
        self.layer = layer
        self.state = directory / "state"
        self.pods: list[Pod] = []
        self.launcher: Launcher

    async def connect(self) -> None:
        """Connect like an agent that starts."""
        self.launcher = await Launcher.connect_or_start(self.state)

    async def pod(self, namespaces: Sequence[str] = ALL, **settings: Any) -> "Pod":
        """A supervisor that has been configured."""
        pod_id = secrets.token_hex(32)
        directory = self.state / "pods" / pod_id
        directory.mkdir()
        plan = PodPlan(id=pod_id, directory=str(directory), namespaces=cast(Any, list(namespaces)))
        pod = Pod(self, pod_id, directory, await self.launcher.fork(plan))
        self.pods.append(pod)
        await pod.supervisor.configure(pod_settings(**settings))
        return pod


class Pod:
    """supervisor: the client of the one that is there now."""

    def __init__(self, node: Node, pod_id: str, directory: Path, supervisor: Supervisor) -> None:
        self.node = node
        self.id = pod_id
        self.directory = directory
        self.supervisor = supervisor

    def plan(self, command: str | list[str], name: str = "main", **changes: Any) -> ContainerPlan:
        argv = ["/bin/sh", "-c", command] if isinstance(command, str) else command
        changes.setdefault("log_path", str(self.log_path(name)))
        root = self.node.directory / self.id[:8] / name
        return container_plan(root, self.node.layer, argv, id=name, **changes)

    def log_path(self, name: str = "main") -> Path:
        return self.node.directory / self.id[:8] / "logs" / name / "0.log"

    async def run(
        self,
        command: str | list[str],
        name: str = "main",
        cgroup: CgroupFds = NO_CGROUP,
        **changes: Any,
    ) -> int:
        """Create and start a container; returns its pid."""
        made = await self.supervisor.create(self.plan(command, name, **changes), cgroup)
        await self.supervisor.start(name)
        return made.pid

    def records(self, name: str = "main") -> list[tuple[str, str, str]]:
        """(stream, tag, text) of each line of the log. Raises UnfinishedLineError."""
        *lines, rest = self.log_path(name).read_bytes().decode().split("\n")
        if rest:
            raise UnfinishedLineError(rest)
        fields = (line.split(" ", 3)[1:] for line in lines)
        return [(stream, tag, text) for stream, tag, text in fields]

    def log(self, name: str = "main") -> list[str]:
        return [text for _, _, text in self.records(name)]

    async def exec(
        self, command: str | list[str], name: str = "main", *, timeout_ms: int = 0, **options: Any
    ) -> ExecHandle:
        argv = ["/bin/sh", "-c", command] if isinstance(command, str) else command
        plan = ExecPlan(
            container=name, argv=argv, tty=options.pop("tty", False), timeout_ms=timeout_ms
        )
        streams = options.pop("streams", ExecIO())
        cgroup = options.pop("cgroup", NO_CGROUP)
        return await self.supervisor.exec(plan, streams, cgroup, **options)

    async def output_of(self, command: str | list[str], name: str = "main") -> str:
        """What a command in the container writes, all of it."""
        reader, writer = os.pipe()
        try:
            handle = await self.exec(command, name, streams=ExecIO(stdout=writer, stderr=writer))
            await handle.wait()
        finally:
            os.close(writer)
        return _read_all(reader)

    async def wait(self, name: str = "main") -> Exit:
        """How a container ended, once that is recorded and told, and its process is reaped."""
        end = None
        while end is None:
            states = await self.supervisor.state()
            end = next((state.exit for state in states if state.id == name), None)
            await asyncio.sleep(0.005)
        await (
            self.supervisor.state()
        )  # what is told is told in the turn of the loop after the record
        return end

    async def kill_supervisor(self) -> None:
        os.kill(self.supervisor.pid, signal.SIGKILL)
        await self.supervisor.lost.wait()
        self.supervisor.close()

    async def succeed(self) -> None:
        """Have the launcher replace a supervisor that was killed."""
        self.supervisor = await self.node.launcher.successor(self.id, self.directory)

    async def reconnect(self) -> None:
        """Connect like an agent that was started again."""
        self.supervisor.close()
        self.supervisor = await Supervisor.connect(self.directory, self.id)


def _read_all(reader: int) -> str:
    with open(reader, "rb") as file:
        return file.read().decode()


def pod_settings(**changes: Any) -> PodSettings:
    settings = PodSettings(hostname=None, sysctls={}, shm_bytes=None, pid="container")
    return cast(PodSettings, {**settings, **changes})


@asynccontextmanager
async def running_node(directory: Path, layer: Path) -> AsyncIterator[Node]:
    node = Node(directory, layer)
    pods = node.state / "pods"
    pods.mkdir(parents=True)
    syscalls.mount(str(pods), str(pods), "", syscalls.MS_BIND)
    syscalls.mount("", str(pods), "", syscalls.MS_PRIVATE)
    try:
        await node.connect()
        yield node
        async with asyncio.timeout(60):
            await asyncio.gather(*(pod.supervisor.shutdown() for pod in node.pods))
            await node.launcher.stop()
    finally:
        _kill_all_that_is_left(node.state)
        syscalls.umount2(str(pods), syscalls.MNT_DETACH)


def _kill_all_that_is_left(state: Path) -> None:
    """After a test that failed: the launcher and the supervisors, and by that no more than they made."""
    for title in (f"nodeagent.sandbox.launcher {state}", *_supervisor_titles(state)):
        for pid in _pids_of(title):
            for child in children(pid):
                _kill(child)
            _kill(pid)


def _supervisor_titles(state: Path) -> list[str]:
    return [f"nodeagent.sandbox.supervisor {pod.name}" for pod in (state / "pods").iterdir()]


def _pids_of(title: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if (
                entry.name.isdecimal()
                and (entry / "cmdline").read_bytes().rstrip(b"\0") == title.encode()
            ):
                found.append(int(entry.name))
    return found


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@contextmanager
def cgroup_fds(group: Cgroup) -> Iterator[CgroupFds]:
    join, watch = group.join_fds(), group.watch_fds()
    given = CgroupFds(join=join, oom=watch.oom, procs=watch.procs, kill=watch.kill)
    try:
        yield given
    finally:
        for _, descriptor in given.named():
            if descriptor is not None:
                os.close(descriptor)


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def children(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(child) for child in text.split()]


def private_kib(pid: int) -> int:
    """What a process shares with no other."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    [private] = [line for line in rollup.splitlines() if line.startswith("Private_Dirty:")]
    return int(private.split()[1])


def mounts_below(directory: Path) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if f" {directory}/" in line]


def waits_in_splice(process: str) -> bool:
    """Whether a process or thread, given by its directory in /proc, waits in the middle of splice(2) (proc(5))."""
    number = libseccomp.number_of("splice")
    return Path(f"{process}/syscall").read_text().startswith(f"{number} ")


async def eventually(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait until something that is not announced is so. A log may be looked at in the middle of a write."""

    def holds() -> bool:
        with suppress(UnfinishedLineError):
            return bool(condition())
        return False

    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110 it happens elsewhere, in other processes
            await asyncio.sleep(0.005)
