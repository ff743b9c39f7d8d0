"""Shortages: something that the agent, a supervisor or the node needs has run out, for a while."""

import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc

from nodeagent.linux import syscalls
from tests.chaos.scarce.node import Node
from tests.e2e.test_recovery import processes_titled
from tests.support.cri import Pod
from tests.support.node import RunningAgent, wait_for

Place = Callable[[RunningAgent], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Shortage:
    """last: has it last as long as its context, with the node in it. names: words of which an error has one.

    place: what there has to be before the agent starts. config: of the agent.
    ends_all: what ran has ended when it is over. is_rare: for the runner only.
    """

    name: str
    last: Callable[[Node], Iterator[None]]
    names: Sequence[str]
    place: Place = lambda _agent: nullcontext()
    config: str = ""
    ends_all: bool = False
    is_rare: bool = False


def tmpfs(name: str, options: str) -> Place:
    """A file system of the agent's own at a directory of its root."""

    @contextmanager
    def mounted(agent: RunningAgent) -> Iterator[None]:
        directory = agent.root / name
        directory.mkdir()
        syscalls.mount("scarce", str(directory), "tmpfs", 0, options)
        try:
            yield
        finally:
            syscalls.umount2(str(directory), syscalls.MNT_DETACH)

    return mounted


def full(directory: str) -> Callable[[Node], Iterator[None]]:
    def last(node: Node) -> Iterator[None]:
        ballast = node.agent.root / directory / "ballast"
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)):
                pass
        yield
        ballast.unlink()

    return last


def without_inodes(directory: str) -> Callable[[Node], Iterator[None]]:
    def last(node: Node) -> Iterator[None]:
        ballast = node.agent.root / directory / "ballast"
        ballast.mkdir()
        made: list[Path] = []
        with suppress(OSError):
            while True:
                made.append(ballast / str(len(made)))
                made[-1].touch()
        yield
        for path in made:
            path.unlink(missing_ok=True)
        ballast.rmdir()

    return last


@contextmanager
def disk(agent: RunningAgent) -> Iterator[None]:
    """An ext4 at the root directory, which an error makes read-only."""
    image, point = agent.root / "disk", agent.root / "lib"
    with image.open("wb") as file:
        file.truncate(128 << 20)
    point.mkdir()
    _run("mkfs.ext4", "-q", "-O", "^has_journal", image)
    _run("mount", "-o", "loop,errors=remount-ro", image, point)
    try:
        yield
    finally:
        _run("umount", point)


def read_only(node: Node) -> Iterator[None]:
    """What the kernel does where a file system has an error; it is repaired without an agent (ext4(5))."""
    image, point = node.agent.root / "disk", node.agent.root / "lib"
    source = _run("findmnt", "-no", "SOURCE", point).strip()
    Path(f"/sys/fs/ext4/{Path(source).name}/trigger_fs_error").write_text("a test")
    yield
    node.agent.kill()
    wait_for("the end of all that holds the file system", lambda: not _killed(node.pids_group()))
    _run("umount", point)
    wait_for("a free device", lambda: source not in _run("losetup", "--list", "--output", "NAME"))
    subprocess.run(["e2fsck", "-fy", image], check=False, capture_output=True)
    _run("mount", "-o", "loop,errors=remount-ro", image, point)
    node.agent.start()


def _killed(group: Path) -> list[int]:
    """The processes in the group and below; they are killed."""
    files = list(group.rglob("cgroup.procs"))
    pids = [int(pid) for file in files for pid in file.read_text().split()]
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return pids


def _run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def without_descriptors(
    who: Callable[[Node], int], spare: int = 0
) -> Callable[[Node], Iterator[None]]:
    """The process can open `spare` descriptors, and not one more."""

    def last(node: Node) -> Iterator[None]:
        pid = who(node)
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        limit = len(os.listdir(f"/proc/{pid}/fd")) + spare
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, before[1]))
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_NOFILE, before)

    return last


def agent(node: Node) -> int:
    return node.agent.pid


def supervisor(node: Node) -> int:
    return node.main.pod.supervisor


def launcher(node: Node) -> int:
    title = f"nodeagent.sandbox.launcher {node.agent.root}/run"
    # A supervisor that it has just forked still has its title.
    wait_for("a launcher alone", lambda: len(list(processes_titled(title))) == 1)
    [pid] = processes_titled(title)
    return pid


def without_pids(node: Node) -> Iterator[None]:
    """In the groups below which the launcher, the supervisors and the containers are."""
    group = node.pids_group()
    before = (group / "pids.max").read_text()
    (group / "pids.max").write_text((group / "pids.current").read_text())
    try:
        yield
    finally:
        (group / "pids.max").write_text(before)


def without_threads(node: Node) -> Iterator[None]:
    """The agent itself can start no thread."""
    above = node.pids_hierarchy()
    group = above / f"na-scarce-{os.getpid()}"
    group.mkdir()
    own = next(
        line.split(":")[2]
        for line in Path(f"/proc/{node.agent.pid}/cgroup").read_text().splitlines()
        if "pids" in line.split(":")[1].split(",") or line.startswith("0:")
    )
    try:
        (group / "cgroup.procs").write_text(str(node.agent.pid))
        (group / "pids.max").write_text((group / "pids.current").read_text())
        yield
    finally:
        (above / own.lstrip("/") / "cgroup.procs").write_text(str(node.agent.pid))
        wait_for("an empty group", lambda: _removed(group))


def _removed(group: Path) -> bool:
    with suppress(OSError):
        group.rmdir()
    return not group.exists()


def without_addresses(node: Node) -> Iterator[None]:
    """Pods take what is left of a tiny subnet; a warm slot has one of its addresses."""
    pods: list[Pod] = []
    with suppress(grpc.RpcError):
        while len(pods) < 10:
            pods.append(node.cri.pod())
    yield
    for pod in pods:
        pod.remove()


SHORTAGES = (
    Shortage("disk full", full("lib"), ("disk", "full", "space"), tmpfs("lib", "size=16m")),
    Shortage(
        "no inodes left",
        without_inodes("lib"),
        ("inodes", "space", "full"),
        tmpfs("lib", "size=64m,nr_inodes=2000"),
    ),
    Shortage("state directory full", full("run"), ("space", "full"), tmpfs("run", "size=8m")),
    Shortage(
        "state directory without inodes",
        without_inodes("run"),
        ("space", "full", "inodes"),
        tmpfs("run", "size=64m,nr_inodes=1000"),
        is_rare=True,
    ),
    Shortage(
        "root directory read-only",
        read_only,
        ("ead-only", "readonly"),
        disk,
        ends_all=True,
    ),
    Shortage(
        "agent without descriptors",
        without_descriptors(agent),
        ("open files", "descriptors"),
    ),
    Shortage(
        "agent with few descriptors",
        without_descriptors(agent, 12),
        ("open files", "descriptors"),
        is_rare=True,
    ),
    Shortage(
        "supervisor without descriptors",
        without_descriptors(supervisor),
        ("open files", "descriptors"),
    ),
    Shortage(
        "launcher without descriptors", without_descriptors(launcher), ("open files", "descriptors")
    ),
    Shortage("no processes left", without_pids, ("process", "pids", "fork", "clone")),
    Shortage("no threads left", without_threads, ("thread", "process"), is_rare=True),
    Shortage(
        "no addresses left",
        without_addresses,
        ("addresses are taken",),
        config='[network]\nsubnet4 = "10.213.77.0/29"\n',
    ),
)
