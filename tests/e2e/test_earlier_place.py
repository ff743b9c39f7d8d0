"""An agent finds the pods of an earlier version, whose default state directory was another one.

Everything is in a mount namespace of the test's own, where /run is empty.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from nodeagent.api import runtime_pb2 as pb
from nodeagent.api import runtime_pb2_grpc as rpc
from tests.e2e.conftest import client
from tests.support.cri import RUNNING, Container
from tests.support.node import RunningAgent, wait_for
from tests.support.registry import Registry

EARLIER = "/run/nodeagent"
NOW = "/run/nodeagent-cri"


class Apart(RunningAgent):
    """In the mount namespace of `holder`. earlier: it has the places of the first versions."""

    def __init__(self, root: Path, holder: int) -> None:
        super().__init__(root)
        self.run = Path(f"/proc/{holder}/root")
        self.holder = holder
        self.earlier = True

    @property
    def endpoint(self) -> str:
        """The endpoint by which the test reaches it, which is not the one that the agent is given."""
        return f"unix://{self.run}{EARLIER if self.earlier else NOW}/nodeagent.sock"

    def command(self, verb: str, *arguments: str) -> list[str]:
        apart = ["nsenter", f"--mount=/proc/{self.holder}/ns/mnt"]
        command = super().command(verb, *arguments)
        at = command.index("--state")
        del command[at : at + 2]
        if "--listen" in command:
            at = command.index("--listen")
            del command[at : at + 2]
        if self.earlier:
            command += ["--state", EARLIER]
            if verb == "serve":
                command += ["--listen", f"unix://{EARLIER}/nodeagent.sock"]
        return [*apart, *command]

    def answers(self, place: str) -> bool:
        with grpc.insecure_channel(f"unix://{self.run}{place}/nodeagent.sock") as channel:
            try:
                rpc.RuntimeServiceStub(channel).Version(pb.VersionRequest(), timeout=10)
            except grpc.RpcError:
                return False
        return True

    def places(self) -> set[str]:
        return {place for place in (EARLIER, NOW) if self.answers(place)}


@pytest.fixture
def agent(tmp_path: Path, registry: Registry) -> Iterator[Apart]:
    script = "mount -t tmpfs run /run && echo held && exec sleep 3600"
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holding:
        assert holding.stdout is not None
        assert holding.stdout.readline() == b"held\n"
        agent = Apart(tmp_path / "agent", holding.pid)
        agent.trust(registry.host)
        try:
            yield agent
        finally:
            agent.stop()
            holding.kill()


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
