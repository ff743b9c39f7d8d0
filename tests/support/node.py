"""An agent of its own for a test: under a temporary root, with names of its own, gone without a trace."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc

from nodeagent.api import runtime_pb2 as pb
from nodeagent.api import runtime_pb2_grpc as rpc

EMULATED = os.environ.get("NODEAGENT_GUEST") == "qemu"
# What only a fault makes last this long: the machine may be slow, and busy with others.
PATIENCE_SECONDS = 180.0 if EMULATED else 90.0
MAX_MESSAGE_BYTES = 16 << 20  # as the kubelet and crictl have it


class RunningAgent:
    """`nodeagent serve` as a child process. `kill` and `start` again is a crash and a recovery.

    code: the directory that has the package, None for the one under test.
    """

    def __init__(self, root: Path, *, config: str = "", options: Sequence[str] = ()) -> None:
        self.root = root
        self.socket = root / "cri.sock"
        self.certs = root / "certs.d"
        self.metrics = f"127.0.0.1:{free_port()}"
        self.log = root / "agent.log"
        self._config = root / "config.toml"
        self._options = options
        self.code: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: grpc.Channel | None = None
        root.mkdir(parents=True, exist_ok=True)
        self.certs.mkdir(exist_ok=True)
        self._config.write_text(config)

    @property
    def endpoint(self) -> str:
        return f"unix://{self.socket}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def runtime(self) -> rpc.RuntimeServiceStub:
        assert self._channel is not None
        return rpc.RuntimeServiceStub(self._channel)

    @property
    def images(self) -> rpc.ImageServiceStub:
        assert self._channel is not None
        return rpc.ImageServiceStub(self._channel)

    def trust(self, registry: str, *names: str) -> None:
        """Send pulls from the named registries (and from itself) to one that speaks plain HTTP."""
        for name in (registry, *names):
            directory = self.certs / name
            directory.mkdir(exist_ok=True)
            text = f'[host."http://{registry}"]\ncapabilities = ["pull", "resolve"]\n'
            (directory / "hosts.toml").write_text(text)

    def command(self, verb: str, *arguments: str) -> list[str]:
        """A `nodeagent` command line for this root."""
        places = [
            "--config",
            self._config,
            "--root",
            self.root / "lib",
            "--state",
            self.root / "run",
        ]
        python = [sys.executable]
        if self.code is not None:
            python = ["env", f"PYTHONPATH={self.code}", sys.executable, "-P"]
        return [*python, "-m", "nodeagent", *verb.split(), *map(str, places), *arguments]

    def start(self) -> None:
        """Return once it answers."""
        self.launch()
        self.await_start()

    def launch(self) -> None:
        """Start the process, and do not wait for it."""
        arguments = ["--listen", self.endpoint, "--metrics", self.metrics]
        arguments += ["--certs-dir", str(self.certs), *self._options]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command("serve", *arguments), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def await_start(self) -> None:
        """Return once it answers; kills one that does not."""
        self._channel = grpc.insecure_channel(
            self.endpoint, options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
        )
        try:
            grpc.channel_ready_future(self._channel).result(timeout=PATIENCE_SECONDS)
            self.runtime.Version(pb.VersionRequest(), timeout=PATIENCE_SECONDS)
        except (grpc.RpcError, grpc.FutureTimeoutError):
            self.kill()
            raise RuntimeError(f"the agent did not start:\n{self.log.read_text()}") from None

    def stop(self) -> int:
        """SIGTERM, and its exit code."""
        return self._end(signal.SIGTERM)

    def kill(self) -> int:
        return self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Restart the agent as if it had crashed."""
        self.kill()
        self.start()

    def remove_pods(self) -> None:
        """Remove every pod that is left, so that `stop` leaves nothing."""
        for sandbox in self.runtime.ListPodSandbox(pb.ListPodSandboxRequest()).items:
            self.runtime.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=sandbox.id))

    def _end(self, number: int) -> int:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is None:
            return 0
        if self._process.poll() is None:  # it may have ended already
            os.kill(self.pid, number)
        code = self._process.wait(timeout=PATIENCE_SECONDS)
        self._process = None
        return code


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(what: str, condition: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> None:
    """Poll until a condition holds; a test that waits longer fails with `what`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.02)
