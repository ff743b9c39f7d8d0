"""The node of the charts, with their images on it, and what its agent has skipped."""

import os
import re
from collections.abc import Iterator

import pytest

from tests.charts import cgroups, images
from tests.charts.node import Node
from tests.support import slices

_SKIPPED = pytest.StashKey[list[str]]()

# What the agent says of every request that it takes, and of its own end.
_USUAL = re.compile(r"INFO nodeagent\.(cri\.interceptors: rpc=\w+ code=OK|agent: )")


@pytest.fixture(scope="session")
def cgroup_root() -> Iterator[str]:
    """What the kubelet's `cgroupRoot` would be: where the cgroups of its pods are."""
    name = f"/na-charts-{os.getpid()}"
    cgroups.make(slices.place(name))
    yield name
    cgroups.remove(slices.place(name))


@pytest.fixture(scope="session")
def node(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Node]:
    root = tmp_path_factory.mktemp("charts")
    node = Node(root / "node")
    try:
        archive = root / "node/images.tar"
        images.write_archive(archive)
        node.load(archive)
        node.start()
        try:
            yield node
            node.remove_pods()
        finally:
            code = node.stop()
            request.config.stash[_SKIPPED] = skipped(node)
        assert code == 0, node.log.read_text()
    finally:
        node.shut_down()


def skipped(node: Node) -> list[str]:
    """What the agent's log has since it serves, besides calls that succeeded, without stamps, each once."""
    log = node.log.read_text().partition("serving CRI v1 on")[2]
    lines = [line for line in log.splitlines()[1:] if not _USUAL.search(line)]
    return list(dict.fromkeys(re.sub(r"^\S+ \S+ ", "", line) for line in lines))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    found = terminalreporter.config.stash.get(_SKIPPED, None)
    if found is not None:
        terminalreporter.section("what the charts ask for and the agent skips")
        for line in found or ["nothing"]:
            terminalreporter.line(line)
