"""crictl's streaming verbs, over each of its wires."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.cri import Cri
from tests.support.node import free_port

WIRES = ("spdy", "websocket")


class Streams:
    """crictl's exec, attach and port-forward over one wire, against one agent."""

    def __init__(self, crictl: Path, cri: Cri, wire: str) -> None:
        self._crictl = str(crictl)
        self._endpoint = cri.agent.endpoint
        self._wire = wire

    def command(self, verb: str, *arguments: str) -> list[str]:
        """A command line for a verb."""
        places = ["-r", self._endpoint, "-i", self._endpoint]
        return [self._crictl, *places, verb, "--transport", self._wire, *arguments]

    @contextmanager
    def running(self, verb: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """It with pipes, and not for longer than the context."""
        with subprocess.Popen(
            self.command(verb, *arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    @contextmanager
    def forwarding(self, pod_id: str, remote: int) -> Iterator[int]:
        """The port of loopback where the pod's is; nobody listens yet."""
        port = free_port()
        process = subprocess.Popen(
            self.command("port-forward", pod_id, f"{port}:{remote}"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield port
        finally:
            process.terminate()
            process.wait(timeout=60)
