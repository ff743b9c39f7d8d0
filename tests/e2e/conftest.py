"""A real agent on this machine, with a registry beside it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nodeagent.api import runtime_pb2 as pb
from tests.e2e.streams import WIRES, Streams
from tests.support import images
from tests.support.cri import Cri
from tests.support.node import RunningAgent
from tests.support.registry import Registry

UPSTREAM = ("docker.io", "registry.k8s.io", "gcr.io", "quay.io", "public.ecr.aws")


@contextmanager
def serving(agent: RunningAgent, registry: Registry) -> Iterator[None]:
    """The agent runs and pulls from `registry`; what a test has left is removed, and it ends in order."""
    agent.trust(registry.host, *UPSTREAM)
    agent.start()
    try:
        yield
        agent.remove_pods()
    finally:
        code = agent.stop()
    assert code == 0, agent.log.read_text()


@contextmanager
def running_agent(
    factory: pytest.TempPathFactory, registry: Registry, config: str = ""
) -> Iterator[RunningAgent]:
    running = RunningAgent(factory.mktemp("agent"), config=config)
    with serving(running, registry):
        yield running
    assert "no record explains it" not in running.log.read_text()  # nodeagent_leaks_total


@pytest.fixture(scope="session")
def agent(tmp_path_factory: pytest.TempPathFactory, registry: Registry) -> Iterator[RunningAgent]:
    """One agent for all tests that do not need their own; every pod of theirs is removed at the end."""
    with running_agent(tmp_path_factory, registry) as running:
        yield running


@pytest.fixture
def own_agent(
    tmp_path_factory: pytest.TempPathFactory, registry: Registry
) -> Iterator[RunningAgent]:
    """An agent for a test that kills it."""
    with running_agent(tmp_path_factory, registry) as running:
        yield running


@pytest.fixture(scope="session")
def cri(agent: RunningAgent, registry: Registry) -> Cri:
    return client(agent, registry)


@pytest.fixture
def own_cri(own_agent: RunningAgent, registry: Registry) -> Cri:
    return client(own_agent, registry)


@pytest.fixture(params=WIRES)
def streams(request: pytest.FixtureRequest, crictl: Path, cri: Cri) -> Streams:
    """crictl over each wire."""
    return Streams(crictl, cri, request.param)


def client(agent: RunningAgent, registry: Registry) -> Cri:
    """A client, with the busybox image pulled."""
    busybox = images.busybox()
    reference = f"{registry.host}/{busybox.repository}:{busybox.tags[0]}"
    request = pb.PullImageRequest(image=pb.ImageSpec(image=reference))
    agent.images.PullImage(request, timeout=60)
    return Cri(agent, reference, agent.root / "logs")
