"""A node for the tests: the agent, and the kubelet that drives it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import pytest

from tests.conformance.suite import agent_with_mirrors, has_nftables
from tests.conftest import IN_CI, TOOLS
from tests.kubelet import manifests
from tests.kubelet.node import Kubelet, cgroup_root, shared_mount
from tests.support.node import RunningAgent, free_port
from tests.support.registry import Registry


@dataclass(frozen=True, slots=True)
class Node:
    """host_port: None on a machine that has none. host_folder: what pods see as a volume.

    outages: when the agent or the kubelet was stopped, and up again.
    """

    agent: RunningAgent
    kubelet: Kubelet
    cgroup: str
    host_port: int | None
    host_folder: Path
    outages: list[tuple[datetime, datetime]] = field(default_factory=list)

    @contextmanager
    def outage(self) -> Iterator[None]:
        """Whatever is stopped here, the kubelet may complain of it."""
        begin = datetime.now()  # noqa: DTZ005 as the kubelet's log
        yield
        self.outages.append((begin, datetime.now()))  # noqa: DTZ005


@pytest.fixture(scope="package")
def node(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node, with every pod of `manifests` given to it."""
    kubelet_program, health_program = built("kubelet"), built("grpc-health")
    registry.push(manifests.health_image(health_program))
    root = tmp_path_factory.mktemp("node")
    host_folder, host_port = root / "host", free_port() if has_nftables() else None
    host_folder.mkdir()
    with (
        shared_mount(root / "kubelet") as folder,
        cgroup_root(f"{root.parent.name}-kubelet") as cgroup,
        agent_with_mirrors(root / "agent", registry) as agent,
    ):
        kubelet = Kubelet(kubelet_program, folder, agent.endpoint, cgroup)
        running = Node(agent, kubelet, cgroup, host_port, host_folder)
        for pod in _pods(running):
            kubelet.add(pod)
        kubelet.start()
        try:
            yield running
        finally:
            kubelet.stop()


def _pods(node: Node) -> list[manifests.Json]:
    return [
        manifests.web(node.host_port, node.host_folder),
        manifests.health(),
        manifests.once(),
        manifests.listener(),
        manifests.crash(),
        manifests.hungry(),
        manifests.unhealthy(),
        manifests.graceful(node.host_folder),
    ]


def built(name: str) -> Path:
    """A program of `make kubelet`. In CI it must be there."""
    path = TOOLS / name
    if not path.exists():
        message = f"{name} is not there: `make kubelet` builds it with Go 1.26 or newer"
        pytest.fail(message) if IN_CI else pytest.skip(message)
    return path
