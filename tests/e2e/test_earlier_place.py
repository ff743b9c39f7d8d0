"""An agent finds the pods of an earlier version, whose default state directory was another one."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.e2e.conftest import client
from tests.support.apart import EARLIER, NOW, Apart, agent_apart
from tests.support.cri import RUNNING, Container
from tests.support.node import wait_for
from tests.support.registry import Registry


@pytest.fixture
def agent(tmp_path: Path, registry: Registry) -> Iterator[Apart]:
    with agent_apart(tmp_path / "agent", registry) as agent:
        yield agent


def test_an_upgrade_with_running_pods(agent: Apart, registry: Registry) -> None:
    agent.start()
    cri = client(agent, registry)
    script = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.02; done"
    old = cri.run("sh", "-c", script)
    agent.kill()

    agent.earlier = False
    agent.start()
    assert agent.places() == {EARLIER, NOW}  # the kubelet may have the one or the other
    assert (old.status.state, old.shell("echo works")) == (RUNNING, "works")
    new = cri.run()
    assert new.shell("echo works") == "works"
    os.kill(old.pod.supervisor, 9)
    wait_for("a successor", lambda: works(old))
    done = subprocess.run(agent.command("image ls"), check=True, capture_output=True, text=True)
    assert "busybox" in done.stdout
    agent.restart()
    assert agent.places() == {EARLIER, NOW}
    old.stop()
    numbers = [int(line) for line in old.output.splitlines()]
    assert numbers == list(range(len(numbers)))
    agent.remove_pods()
    assert agent.stop() == 0

    agent.start()
    assert agent.places() == {NOW}
    last = cri.run()
    assert last.shell("echo works") == "works"
    assert not list((agent.run / EARLIER[1:] / "pods").iterdir())
    agent.remove_pods()


def works(container: Container) -> bool:
    try:
        return container.exec("true").exit_code == 0
    except grpc.RpcError:
        return False


def test_a_fresh_node_has_nothing_in_the_earlier_place(agent: Apart) -> None:
    agent.earlier = False
    agent.start()
    assert agent.places() == {NOW}
    assert not (agent.run / EARLIER[1:]).exists()
