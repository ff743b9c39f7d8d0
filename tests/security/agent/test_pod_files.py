"""The files that a container may write to and the runtime made: filled, they fill nothing of the node."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent.api import runtime_pb2 as pb
from nodeagent.linux import syscalls
from nodeagent.sandbox import spec
from nodeagent.sandbox.supervisor import namespaces
from tests.e2e.conftest import UPSTREAM, client
from tests.security.agent.test_mounts import host_pid
from tests.support.cri import EXITED, SLEEP, Container, Cri, options, pod_options
from tests.support.node import RunningAgent, wait_for
from tests.support.registry import Registry

STATE_BYTES = 48 << 20
SHARED_BYTES = spec.DEFAULT_SHM_BYTES + namespaces.FILES_BYTES
FILL = "dd if=/dev/zero of={} bs=1M; echo filled; exec sleep 1000"
NAMES = ("hosts", "hostname", "resolv.conf")


@pytest.fixture
def small_agent(
    tmp_path_factory: pytest.TempPathFactory, registry: Registry
) -> Iterator[RunningAgent]:
    """An agent whose state directory is on a small tmpfs, as /run is."""
    running = RunningAgent(tmp_path_factory.mktemp("agent"))
    running.trust(registry.host, *UPSTREAM)
    state = running.root / "run"
    state.mkdir()
    syscalls.mount("small", str(state), "tmpfs", 0, f"size={STATE_BYTES}")
    try:
        running.start()
        yield running
        running.remove_pods()
        assert running.stop() == 0, running.log.read_text()
    finally:
        running.kill()
        syscalls.umount2(str(state), syscalls.MNT_DETACH)


@pytest.fixture
def small_cri(small_agent: RunningAgent, registry: Registry) -> Cri:
    return client(small_agent, registry)


def free_bytes(directory: Path) -> int:
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def usage_bytes(container: Container) -> int:
    request = pb.ContainerStatsRequest(container_id=container.id)
    stats = container.pod.cri.agent.runtime.ContainerStats(request, timeout=60).stats
    return int(stats.memory.usage_bytes.value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ipc", [pb.POD, pb.NODE], ids=["own shm", "the node's shm"])
def test_filling_a_file_of_the_pod(small_cri: Cri, name: str, ipc: pb.NamespaceMode) -> None:
    state = small_cri.agent.root / "run"
    pod = small_cri.pod(linux=pod_options(ipc=ipc))
    before = free_bytes(state)
    attacker = pod.run("sh", "-c", FILL.format(f"/etc/{name}"))
    attacker.said("filled")
    assert before - free_bytes(state) < 1 << 20
    assert usage_bytes(attacker) > SHARED_BYTES - (8 << 20)  # its own memory, not the node's
    other = small_cri.run("sh", "-c", "exit 42")
    assert other.ended().exit_code == 42
    pod.run("sh", "-c", "exit 41", name="sibling").ended()
    attacker.stop()
    other.pod.remove()
    pod.remove()


def test_a_limit_of_memory_holds_for_them(small_cri: Cri) -> None:
    linux = pb.LinuxContainerConfig(
        resources=pb.LinuxContainerResources(memory_limit_in_bytes=32 << 20)
    )
    attacker = small_cri.run("sh", "-c", FILL.format("/etc/hosts"), linux=linux)
    wait_for("the OOM killer", lambda: "filled" in attacker.output or has_ended(attacker))
    assert usage_or_none(attacker) <= 32 << 20
    attacker.pod.remove()


def has_ended(container: Container) -> bool:
    return bool(container.status.state == EXITED)


def usage_or_none(container: Container) -> int:
    return 0 if has_ended(container) else usage_bytes(container)


def test_shared_memory_has_its_usual_size(cri: Cri) -> None:
    """The files beside it take nothing of it; and it, when it is full, nothing of what is in them."""
    container = cri.pod().run(*SLEEP)
    script = "dd if=/dev/zero of=/dev/shm/x bs=1M count=64 && cat /etc/hostname"
    assert container.shell(script) == container.pod.config.hostname
    container.exec("sh", "-c", "dd if=/dev/zero of=/dev/shm/y bs=1M")
    assert container.shell("cat /etc/hostname; grep -c localhost /etc/hosts").split() == [
        container.pod.config.hostname,
        "2",
    ]
    assert container.exec("touch", "/dev/shm/z").exit_code == 0
    container.pod.remove()


@pytest.mark.parametrize("readonly", [False, True], ids=["writable", "read-only"])
def test_they_are_what_they_were(cri: Cri, readonly: bool) -> None:
    """Writable in place with a writable root only; no program, device or set-user-ID bit in them counts."""
    container = cri.pod().run(*SLEEP, linux=options(readonly_rootfs=readonly))
    written = container.exec("sh", "-c", "echo 192.0.2.1 other >> /etc/hosts")
    assert (written.exit_code == 0) is not readonly
    mounts = container.shell("grep -E ' /etc/(hosts|hostname|resolv.conf) ' /proc/self/mounts")
    for line in mounts.splitlines():
        attributes = line.split()[3].split(",")
        assert {"nosuid", "nodev", "noexec", "ro" if readonly else "rw"} <= set(attributes)
    assert len(mounts.splitlines()) == len(NAMES)
    container.pod.remove()


# ---- a state directory that somebody else has filled ----


def fill(state: Path) -> Path:
    filler = state / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
    assert free_bytes(state) == 0
    return filler


def test_exit_codes_are_recorded_on_a_full_state_directory(small_cri: Cri) -> None:
    """Also where nobody is left who has seen the end: the agent and the supervisor are killed after it."""
    agent = small_cri.agent
    container = small_cri.run(
        "sh", "-c", "trap 'exit 42' TERM; echo up; while :; do sleep 0.1; done"
    )
    container.said("up")
    pid, supervisor = host_pid(container), container.pod.supervisor
    agent.kill()
    filler = fill(agent.root / "run")
    os.kill(pid, signal.SIGTERM)
    wait_for("its end", lambda: not Path(f"/proc/{pid}").exists())
    os.kill(supervisor, signal.SIGKILL)
    wait_for("the supervisor's end", lambda: not Path(f"/proc/{supervisor}").exists())
    filler.unlink()
    agent.start()
    assert container.ended().exit_code == 42
    container.pod.remove()
