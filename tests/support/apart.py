"""An agent with the default places of its files, in a mount namespace of its own, where /run is empty."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from nodeagent.api import runtime_pb2 as pb
from nodeagent.api import runtime_pb2_grpc as rpc
from tests.support.node import RunningAgent
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
        """As the test reaches it, which is not how the agent is told of it."""
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


@contextmanager
def agent_apart(root: Path, registry: Registry) -> Iterator[Apart]:
    """Not started; stopped at the end."""
    script = "mount -t tmpfs run /run && echo held && exec sleep 3600"
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holding:
        assert holding.stdout is not None
        assert holding.stdout.readline() == b"held\n"
        agent = Apart(root, holding.pid)
        agent.trust(registry.host)
        try:
            yield agent
        finally:
            agent.stop()
            holding.kill()
