"""The background tasks of the network, when their work fails once, and when it always fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest

from nodeagent.net import links, listeners, setup
from nodeagent.net.network import Network, PortMapping
from nodeagent.store import Store
from nodeagent.tasks import Tasks
from tests.kernel.net.conftest import DUAL_STACK, INSTANCE, PodMaker, World
from tests.kernel.net.world import needs_nf_tables
from tests.support.faults import Fault, any_error, impatient_tasks, until

BRIDGE = f"na{INSTANCE}"


@dataclass
class Node:
    """A network, what may fail of it, and what its tasks are asked with."""

    network: Network
    tasks: Tasks
    fault: Fault
    world: World
    new_pod: PodMaker
    patch: pytest.MonkeyPatch


@pytest.fixture
async def node(
    world: World,
    store: Store,
    new_pod: PodMaker,
    monkeypatch: pytest.MonkeyPatch,
    error: Callable[[], Exception],
) -> AsyncIterator[Node]:
    async with impatient_tasks() as tasks:
        network = await Network.start(
            config=DUAL_STACK, store=store, instance=INSTANCE, tasks=tasks
        )
        yield Node(network, tasks, Fault(error), world, new_pod, monkeypatch)
        await network.close(remove=True)


@dataclass
class Work:
    task: str
    ask: Callable[[], Awaitable[object]]
    is_done: Callable[[], bool]


async def releasing_leases(node: Node) -> Work:
    node.patch.setattr("nodeagent.net.network._PATIENCE_NS", 0)
    pod, _, _ = await node.new_pod(node.network)

    async def ask() -> None:
        await node.network.detach(pod.id)

    return Work("network leases", ask, lambda: not node.network._ipam.leases)


async def looking_for_links(node: Node) -> Work:
    node.patch.setattr(links, "exists", node.fault.before(links.exists))
    return await releasing_leases(node)


async def forgetting_leases(node: Node) -> Work:
    ipam = node.network._ipam
    node.patch.setattr(ipam, "forget", node.fault.before(ipam.forget))
    return await releasing_leases(node)


async def mending_the_bridge(node: Node) -> Work:
    node.patch.setattr(setup, "set_up", node.fault.before_async(setup.set_up))

    async def ask() -> None:
        async with node.world.node.routing() as ipr:
            await ipr.link("del", index=node.world.node.links()[BRIDGE])
        assert not node.network.status().ready

    return Work("network bridge", ask, lambda: node.network.status().ready)


each_work = pytest.mark.parametrize(
    "make",
    [looking_for_links, forgetting_leases, mending_the_bridge],
    ids=lambda make: make.__name__,
)


@any_error
@each_work
async def test_work_goes_on_after_a_failure(
    node: Node, make: Callable[[Node], Awaitable[Work]]
) -> None:
    work = await make(node)
    node.fault.once()
    await work.ask()
    await until(lambda: count(node, work) == 1)
    await until(work.is_done)
    assert count(node, work) == 1


@any_error
@each_work
async def test_work_that_always_fails_is_named_and_holds_up_no_end(
    node: Node,
    make: Callable[[Node], Awaitable[Work]],
    error: Callable[[], Exception],
    caplog: pytest.LogCaptureFixture,
) -> None:
    work = await make(node)
    node.fault.for_ever()
    await work.ask()
    await until(lambda: count(node, work) >= 3)
    (named,) = [record for record in caplog.records if f"{work.task}: " in record.getMessage()]
    assert str(error()) in named.getMessage()
    assert named.exc_info is not None
    assert str(error()) in node.tasks.failures.by_name[work.task].last_error
    await node.tasks.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    node.fault.stop()


def count(node: Node, work: Work) -> int:
    return node.tasks.failures.by_name[work.task].count


@needs_nf_tables
@any_error
async def test_work_behind_a_host_port_that_fails_is_named(
    node: Node, error: Callable[[], Exception]
) -> None:
    """The port is forwarded all the same."""
    node.patch.setattr(listeners, "warnings", node.fault.before(listeners.warnings))
    pod, _, _ = await node.new_pod(node.network)
    node.fault.for_ever()
    web = PortMapping(protocol="tcp", container_port=80, host_port=8080)
    await node.network.publish(pod.id, [web])
    failure = node.tasks.failures.by_name["host ports"]
    await until(lambda: failure.count == 1)
    assert str(error()) in failure.last_error
    await node.network.detach(pod.id)
