"""The limit of containers' logs, from the agent's configuration to what its metrics say of it."""

import json
import re
import urllib.request

import pytest

from nodeagent.api import runtime_pb2 as pb
from tests.e2e.conftest import client, running_agent
from tests.support.node import RunningAgent, wait_for
from tests.support.registry import Registry

CONFIG = "[container_logs]\nmax_bytes_per_second = 100_000\nburst_bytes = 50_000\n"
HELD_BACK = "nodeagent_container_log_held_back_seconds_total"


def test_a_container_that_logs_too_much_waits(
    tmp_path_factory: pytest.TempPathFactory, registry: Registry
) -> None:
    with running_agent(tmp_path_factory, registry, CONFIG) as agent:
        container = client(agent, registry).run("sh", "-c", "seq 3000; echo end; exec sleep 1000")
        wait_for("time in which it is held back", lambda: held_back(agent, container.id) > 0)
        container.said("end", 60)
        assert container.output.split() == [*map(str, range(1, 3001)), "end"]
        request = pb.ContainerStatusRequest(container_id=container.id, verbose=True)
        answer = container.pod.cri.agent.runtime.ContainerStatus(request)
        log = json.loads(answer.info["info"])["log"]
        assert log["heldBackMs"] > 0
        assert log["droppedLines"] == 0
        container.pod.remove()


def held_back(agent: RunningAgent, container: str) -> float:
    """Seconds."""
    with urllib.request.urlopen(f"http://{agent.metrics}/metrics", timeout=60) as page:
        text = page.read().decode()
    found = re.search(rf'^{HELD_BACK}{{.*id="{container}".*}} (\S+)$', text, re.MULTILINE)
    return float(found[1]) if found else 0.0
