"""Gray failures: a process, a group or a file system is there, and does not answer."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Queue
from typing import Literal

from aiohttp import web

from nodeagent.api import runtime_pb2 as pb
from nodeagent.linux import syscalls
from tests.chaos.gray.world import Sufferer, World
from tests.e2e.test_dead_file_systems import MUTE
from tests.e2e.test_recovery import processes_titled
from tests.support import fake_registry, tars
from tests.support.cri import Container
from tests.support.node import PATIENCE_SECONDS, wait_for

DEVICE = "CreateContainer with a device"

Inflict = Callable[[World, Path], Iterator[Sufferer]]


@dataclass(frozen=True, slots=True)
class Fault:
    """A gray failure.

    inflict: makes the pod that suffers, and has the fault last as long as its context.
    stops: what cannot go on meanwhile, for anybody. on_disk: the agent's root directory has a file system of its own.
    is_traced: the agent is slower than otherwise.
    """

    name: str
    inflict: Inflict
    stops: Literal["nothing", "new pods", "everything"] = "nothing"
    on_disk: bool = False
    is_traced: bool = False


def usual(world: World) -> Sufferer:
    pod = world.cri.pod()
    main = pod.run(
        "sh", "-c", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.05; done", name="main"
    )
    return Sufferer(pod, main, pod.container(name="parked"))


@contextmanager
def standing(pid: int) -> Iterator[None]:
    """The process is stopped meanwhile, unless it is killed."""
    process = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(process, signal.SIGSTOP)
        yield
    finally:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGCONT)
        os.close(process)


def stopped_agent(world: World, _folder: Path) -> Iterator[Sufferer]:
    sufferer = usual(world)
    with standing(world.agent.pid):
        yield sufferer


def stopped_launcher(world: World, _folder: Path) -> Iterator[Sufferer]:
    sufferer = usual(world)
    title = f"nodeagent.sandbox.launcher {world.agent.root}/run"
    # A supervisor that it has just forked still has its title.
    wait_for("a launcher alone", lambda: len(list(processes_titled(title))) == 1)
    with standing(*processes_titled(title)):
        yield sufferer


def stopped_supervisor(world: World, _folder: Path) -> Iterator[Sufferer]:
    sufferer = usual(world)
    with standing(sufferer.pod.supervisor):
        yield sufferer


def stopped_init(world: World, _folder: Path) -> Iterator[Sufferer]:
    """The first process of a container that is to be started: it never executes the program."""
    sufferer = usual(world)
    assert sufferer.parked is not None
    with standing(pid_of(sufferer.parked)):
        yield sufferer


def frozen_group(world: World, _folder: Path) -> Iterator[Sufferer]:
    sufferer = usual(world)
    freeze(sufferer.main)
    try:
        yield sufferer
    finally:
        freeze(sufferer.main, frozen=False)


def unkillable_program(world: World, folder: Path) -> Iterator[Sufferer]:
    """In a read from a file system that comes with a volume; in state D once it is killed."""
    pod = world.cri.pod()
    volume = pb.Mount(host_path=str(folder), container_path="/data")
    with mute(folder / "mute"):
        main = pod.run("cat", "/data/mute/file", mounts=[volume])
        wait_for("a program that reads", partial(reads, main))
        yield Sufferer(pod, main, pod.container(name="parked"))


def mute_volume(world: World, folder: Path) -> Iterator[Sufferer]:
    """A creation waits in it, with the supervisor's child; and one with the agent, which looks for a device there."""
    pod = world.cri.pod()
    main = pod.run()
    sufferer = Sufferer(pod, main, pod.container(name="parked"))
    with mute(folder / "mute"):
        request = pb.CreateContainerRequest(
            pod_sandbox_id=pod.id,
            sandbox_config=pod.config,
            config=pb.ContainerConfig(
                metadata=pb.ContainerMetadata(name="hangs"),
                image=pb.ImageSpec(image=world.cri.image),
                command=["true"],
                mounts=[
                    pb.Mount(host_path=str(folder / "mute"), container_path="/data"),
                    pb.Mount(host_path="/dev/shm", container_path="/data/inner"),
                ],
            ),
        )
        call = world.agent.runtime.CreateContainer.future(request, timeout=2 * PATIENCE_SECONDS)
        device = pb.Device(
            host_path=str(folder / "mute/device"), container_path="/dev/x", permissions="r"
        )
        other = pb.CreateContainerRequest()
        other.CopyFrom(request)
        other.config.metadata.name = "asks for a device"
        del other.config.mounts[:]
        other.config.devices.append(device)
        sufferer.further.append((DEVICE, world.agent.runtime.CreateContainer, other))
        yield sufferer
        call.cancel()


def mute_log_directory(world: World, folder: Path) -> Iterator[Sufferer]:
    """The directory of a pod's logs is covered when its containers run: a rotation, and a start, wait in it."""
    pod = world.cri.pod(log_directory=str(folder / "logs"))
    main = pod.run("sh", "-c", "while :; do echo line; sleep 0.05; done")
    parked = pod.container(name="parked")
    with mute(folder / "logs"):
        yield Sufferer(pod, main, parked)


def slow_registry(world: World, _folder: Path) -> Iterator[Sufferer]:
    """It sends a byte of each layer a second."""
    sufferer = usual(world)
    with dripping() as reference:
        world.agent.trust(reference.partition("/")[0])
        request = pb.PullImageRequest(image=pb.ImageSpec(image=reference))
        sufferer.further.append(("PullImage", world.agent.images.PullImage, request))
        yield sufferer


def slow_sync(world: World, _folder: Path) -> Iterator[Sufferer]:
    """Each fsync, fdatasync and syncfs of the agent takes a second."""
    sufferer = usual(world)
    image = pb.ImageSpec(image=world.another_image)
    sufferer.further.append(
        ("PullImage", world.agent.images.PullImage, pb.PullImageRequest(image=image))
    )
    with delaying_syncs(world.agent.pid):
        yield sufferer


def frozen_disk(world: World, _folder: Path) -> Iterator[Sufferer]:
    """The file system of the root directory: whoever writes to it waits in state D (fsfreeze(8), a snapshot)."""
    sufferer = usual(world)
    image = pb.ImageSpec(image=world.another_image)
    world.agent.images.PullImage(pb.PullImageRequest(image=image), timeout=PATIENCE_SECONDS)
    request = pb.RemoveImageRequest(image=image)
    sufferer.further.append(("RemoveImage", world.agent.images.RemoveImage, request))
    disk = str(world.agent.root / "lib")
    subprocess.run(["fsfreeze", "--freeze", disk], check=True)
    try:
        yield sufferer
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", disk], check=True)


def many_files(world: World, _folder: Path) -> Iterator[Sufferer]:
    """A container is removed whose writable layer has many of them."""
    pod = world.cri.pod()
    full = pod.run(name="full")
    made = f"mkdir /many && cd /many && i=0; while [ $i -lt {world.files} ]; do : > f$i; i=$((i+1)); done"
    assert full.exec("sh", "-c", made, timeout=3600).exit_code == 0
    sufferer = Sufferer(pod, pod.run(), pod.container(name="parked"))
    request = pb.RemoveContainerRequest(container_id=full.id)
    sufferer.further.append(("RemoveContainer", world.agent.runtime.RemoveContainer, request))
    yield sufferer
    trash = world.agent.root / "lib/trash"
    wait_for("empty trash", lambda: not list(trash.iterdir()), 3600)


def many_unkillable_commands(world: World, folder: Path) -> Iterator[Sufferer]:
    """In containers that are stopped: their groups cannot be removed, and each attempt waits for the processes."""
    pods, calls = [world.cri.pod() for _ in range(COMMANDS)], []
    volume = pb.Mount(host_path=str(folder), container_path="/data")
    runtime = world.agent.runtime
    with mute(folder / "mute"):
        mains = [pod.run(mounts=[volume]) for pod in pods]
        for main in mains:
            command = ["cat", f"/data/mute/{main.id}"]
            request = pb.ExecSyncRequest(container_id=main.id, cmd=command, timeout=600)
            calls.append(runtime.ExecSync.future(request))
            wait_for("a command that reads", partial(reads, main))
        sufferer = Sufferer(pods[0], mains[0], pods[0].container(name="parked"))
        for number, main in enumerate(mains[1:]):
            removal = pb.RemoveContainerRequest(container_id=main.id)
            sufferer.further.append((f"RemoveContainer {number}", runtime.RemoveContainer, removal))
        yield sufferer
    for call in calls:
        call.cancel()
    for pod in pods[1:]:
        pod.remove()


COMMANDS = 10  # more than the event loop's own executor has threads on two processors

FAULTS = (
    Fault("agent stopped", stopped_agent, stops="everything"),
    Fault("launcher stopped", stopped_launcher, stops="new pods"),
    Fault("supervisor stopped", stopped_supervisor),
    Fault("init stopped", stopped_init),
    Fault("cgroup frozen", frozen_group),
    Fault("program that no signal ends", unkillable_program),
    Fault("commands that no signal ends", many_unkillable_commands),
    Fault("volume does not answer", mute_volume),
    Fault("log directory does not answer", mute_log_directory),
    Fault("root directory frozen", frozen_disk, stops="new pods", on_disk=True),
    Fault("registry sends a byte a second", slow_registry),
    Fault("syncs take a second", slow_sync, is_traced=True),
    Fault("many files to remove", many_files),
)


@contextmanager
def dripping() -> Iterator[str]:
    """A registry that sends a byte of a layer each second; the reference of its image."""
    started: Queue[str] = Queue()
    over = threading.Event()

    async def drip(request: web.Request) -> web.StreamResponse | None:
        if "/blobs/" not in request.path:
            return None
        response = web.StreamResponse()
        response.content_length = 1 << 20
        await response.prepare(request)
        while True:
            await response.write(b"x")
            await asyncio.sleep(1)

    async def serve() -> None:
        async with fake_registry.serving() as server:
            image = fake_registry.image(fake_registry.layer(tars.file("a", b"a" * 1000)))
            server.add(image)
            server.hooks.append(drip)
            started.put(f"{server.host}/{image.repository}:{image.tags[0]}")
            while not over.is_set():  # noqa: ASYNC110 it is set by another thread
                await asyncio.sleep(0.05)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        yield started.get(timeout=PATIENCE_SECONDS)
    finally:
        over.set()
        thread.join()


@contextmanager
def delaying_syncs(pid: int) -> Iterator[None]:
    """strace(1) makes each of these calls of the process last a second longer."""
    calls = "fsync,fdatasync,syncfs"
    command = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={calls}"]
    command += ["-e", f"inject={calls}:delay_exit=1000000", "-p", str(pid)]
    with subprocess.Popen(command) as strace:
        try:
            wait_for("strace", lambda: tracer_of(pid) == strace.pid)
            yield
        finally:
            strace.terminate()


def tracer_of(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("TracerPid:")[2].split()[0])


@contextmanager
def mute(point: Path) -> Iterator[None]:
    """A file system whose server takes every request and answers none, until the end of this."""
    point.mkdir(exist_ok=True)
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    data = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
    syscalls.mount("nodeagent-test", str(point), "fuse", 0, data)
    with subprocess.Popen([sys.executable, "-c", MUTE, str(device)], pass_fds=[device]) as server:
        os.close(device)
        try:
            yield
        finally:
            server.kill()
            syscalls.umount2(str(point), syscalls.MNT_DETACH)


def pid_of(container: Container) -> int:
    request = pb.ContainerStatusRequest(container_id=container.id, verbose=True)
    answer = container.pod.cri.agent.runtime.ContainerStatus(request, timeout=PATIENCE_SECONDS)
    return int(json.loads(answer.info["info"])["pid"])


def groups_of(container: Container) -> list[Path]:
    return [Path(path) for path, _, _ in os.walk("/sys/fs/cgroup") if path.endswith(container.id)]


def reads(container: Container) -> bool:
    """Whether a command in it waits for the file system, or for another one that does."""
    return bool(
        {"request_wait_answer", "fuse_lock_inode", "d_alloc_parallel"} & waits_in(container)
    )


def waits_in(container: Container) -> set[str]:
    """The kernel functions that its processes wait in (proc_pid_wchan(5))."""
    files = {group / "cgroup.procs" for group in groups_of(container)}
    found = set()
    for pid in {pid for file in files for pid in file.read_text().split()}:
        with suppress(OSError):
            found.add(Path(f"/proc/{pid}/wchan").read_text())
    return found


def freeze(container: Container, *, frozen: bool = True) -> None:
    for group in groups_of(container):
        for name, on, off in (("freezer.state", "FROZEN", "THAWED"), ("cgroup.freeze", "1", "0")):
            if (group / name).exists():
                (group / name).write_text(on if frozen else off)
