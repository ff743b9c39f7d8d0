"""A state directory without a byte left: how containers end is recorded all the same, whoever sees it."""

import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from nodeagent.linux import syscalls
from nodeagent.sandbox import exits
from nodeagent.sandbox.agent.client import ContainerState
from tests.kernel.sandbox.supervised import (
    NO_CGROUP,
    Node,
    Pod,
    children,
    eventually,
    exists,
    running_node,
)

STATE_BYTES = 8 << 20


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A directory with a small file system for the state."""
    state = tmp_path / "state"
    state.mkdir()
    syscalls.mount("small", str(state), "tmpfs", 0, f"size={STATE_BYTES}")
    yield tmp_path
    syscalls.umount2(str(state), syscalls.MNT_DETACH)


@pytest.fixture
async def node(small: Path, layer: Path) -> AsyncIterator[Node]:
    async with running_node(small, layer) as node:
        yield node


def fill(node: Node) -> None:
    with (node.state / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
    assert os.statvfs(node.state).f_bavail == 0


async def state(pod: Pod) -> ContainerState:
    [only] = await pod.supervisor.state()
    return only


async def test_the_supervisor_records(node: Node) -> None:
    pod = await node.pod()
    pid = await pod.run("trap 'exit 42' TERM; while :; do sleep 0.01; done")
    fill(node)
    os.kill(pid, signal.SIGTERM)
    await eventually(lambda: not exists(pid))
    await pod.kill_supervisor()
    await pod.succeed()
    assert (await state(pod)).exit is not None
    recorded = exits.read(str(pod.directory), "main")
    assert recorded is not None
    assert recorded["code"] == 42
    (node.state / "filler").unlink()


async def test_the_launcher_records(node: Node) -> None:
    pod = await node.pod()
    pid = await pod.run("trap 'exit 42' TERM; while :; do sleep 0.01; done")
    await pod.kill_supervisor()
    await eventually(lambda: pid in children(node.launcher.pid))
    fill(node)
    os.kill(pid, signal.SIGTERM)
    await eventually(lambda: not exists(pid))
    recorded = exits.read(str(pod.directory), "main")
    assert recorded is not None
    assert recorded["code"] == 42
    (node.state / "filler").unlink()
    await pod.succeed()


async def test_what_containers_share_takes_nothing_of_it(node: Node) -> None:
    pod = await node.pod()
    shared = pod.directory / "shared"
    (shared / "resolv.conf").write_text("")
    before = os.statvfs(node.state).f_bavail
    mount = {
        "kind": "bind",
        "source": str(shared / "resolv.conf"),
        "target": "/etc/resolv.conf",
        "attributes": [],
        "propagation": "private",
        "recursive": False,
        "data": {},
    }
    plan = pod.plan("dd if=/dev/zero of=/etc/resolv.conf bs=64k; echo $?; sleep 1000")
    plan["mounts"].append(mount)  # type: ignore[arg-type]
    await pod.supervisor.create(plan, NO_CGROUP)
    await pod.supervisor.start("main")
    await eventually(lambda: "1" in pod.log())
    assert os.statvfs(shared).f_bavail == 0
    assert before - os.statvfs(node.state).f_bavail < (256 << 10) // 4096
    await pod.run("exit 0", "other")


async def test_a_record_is_written_once_and_goes_with_its_container(node: Node) -> None:
    pod = await node.pod()
    await pod.run("exit 7")
    await pod.wait("main")
    directory = str(pod.directory)
    first = exits.read(directory, "main")
    assert first is not None
    assert exits.record(directory, "main", {"code": 9, "at": 1, "oom": True}) == first
    assert exits.read(directory, "main") == first
    await pod.supervisor.remove("main")
    assert os.listdir(pod.directory / "exits") == []
