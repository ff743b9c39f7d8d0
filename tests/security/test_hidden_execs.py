"""An exec is not to be seen in its container before it has given up the node's rights."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from nodeagent.linux import capabilities
from tests.kernel.sandbox.containers import DEFAULT_CAPABILITIES
from tests.kernel.sandbox.supervised import Node, running_node

# Writes down the capabilities of all processes that it sees, for as long as it runs.
WATCH = "while :; do for p in /proc/[0-9]*; do grep -h CapPrm $p/status 2> /dev/null; done; done"
EXECS = 40


@pytest.fixture
async def node(tmp_path: Path, layer: Path) -> AsyncIterator[Node]:
    async with running_node(tmp_path, layer) as node:
        yield node


def with_capabilities(*names: str) -> dict[str, Any]:
    mask = capabilities.mask(names)
    sets = dict.fromkeys(("bounding", "permitted", "effective"), mask)
    return {"capabilities": {**sets, "inheritable": 0, "ambient": 0}}


async def sets_seen(node: Node, *names: str) -> set[int]:
    """What the processes that a container saw were allowed, while there were execs in it."""
    pod = await node.pod()
    await pod.run(WATCH, process=with_capabilities(*names))
    for _ in range(EXECS):
        handle = await pod.exec(["/bin/true"])
        assert (await handle.wait()).code == 0
    await asyncio.sleep(0.2)
    return {int(line.split()[1], 16) for line in pod.log() if line.startswith("CapPrm")}


async def test_who_may_trace_sees_no_process_with_more_rights(node: Node) -> None:
    names = (*DEFAULT_CAPABILITIES, "SYS_PTRACE")
    assert await sets_seen(node, *names) == {capabilities.mask(names)}


async def test_another_container_that_may_trace(node: Node) -> None:
    """In a PID namespace that the pod shares, it is enough that one of them may."""
    pod = await node.pod(pid="pod")
    names = (*DEFAULT_CAPABILITIES, "SYS_PTRACE")
    await pod.run(WATCH, "watcher", pid="pod", process=with_capabilities(*names))
    await pod.run(["/bin/sleep", "1000"], "other", pid="pod")
    await asyncio.sleep(0.2)
    before = len(pod.log("watcher"))
    for _ in range(EXECS):
        await (await pod.exec(["/bin/true"], "other")).wait()
    await asyncio.sleep(0.2)
    seen = {int(line.split()[1], 16) for line in pod.log("watcher")[before:]}
    # besides containers, the process that holds the namespace, without any
    assert seen <= {capabilities.mask(names), capabilities.mask(DEFAULT_CAPABILITIES), 0}


@pytest.mark.parametrize("number", [9, 15])
async def test_the_end_of_a_hidden_exec_is_that_of_the_program(node: Node, number: int) -> None:
    pod = await node.pod()
    names = (*DEFAULT_CAPABILITIES, "SYS_PTRACE")
    await pod.run(["/bin/sleep", "1000"], process=with_capabilities(*names))
    for command, code in ((f"kill -{number} $$", 128 + number), ("exit 7", 7)):
        handle = await pod.exec(command)
        assert (await handle.wait()).code == code


async def test_a_hidden_exec_ends_with_its_time(node: Node) -> None:
    pod = await node.pod()
    names = (*DEFAULT_CAPABILITIES, "SYS_PTRACE")
    await pod.run(["/bin/sleep", "1000"], process=with_capabilities(*names))
    for timeout_ms in (1, 3, 6, 10, 100):
        handle = await pod.exec(["/bin/sleep", "1000"], timeout_ms=timeout_ms)
        end = await asyncio.wait_for(handle.wait(), 60)
        assert (end.code, end.timed_out) == (137, True)
