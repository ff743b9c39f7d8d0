from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from nodeagent.net.network import Network, NetworkConfig
from nodeagent.store import Store
from nodeagent.tasks import Tasks
from tests.kernel.net.world import Namespace, Pod, node_and_neighbour

INSTANCE = "0a1b2c3d"
DUAL_STACK = NetworkConfig(subnet6="fd00:1::/64")


@dataclass(frozen=True, slots=True)
class World:
    node: Namespace
    neighbour: Namespace


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with node_and_neighbour() as (node, neighbour):
        yield World(node, neighbour)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(tmp_path / "state.db")
    yield opened
    opened.close()


@pytest.fixture
async def network(world: World, store: Store) -> AsyncIterator[Network]:
    """Dual stack, on the node of `world`."""
    started = await Network.start(config=DUAL_STACK, store=store, instance=INSTANCE, tasks=Tasks())
    yield started
    await started.close(remove=True)


PodMaker = Callable[[Network], Awaitable[tuple[Pod, str, str]]]


@pytest.fixture
async def new_pod(world: World) -> AsyncIterator[PodMaker]:
    """Makes attached pods, and gives each one's IPv4 and IPv6 address ("" for none)."""
    async with AsyncExitStack() as stack:

        async def make(network: Network) -> tuple[Pod, str, str]:
            pod = Pod()
            stack.callback(pod.close)
            lease = await network.attach(pod.id, pod.namespace.descriptor, pod.route)
            bare = [address.partition("/")[0] for address in lease.addresses]
            return pod, bare[0], bare[1] if len(bare) > 1 else ""

        yield make
