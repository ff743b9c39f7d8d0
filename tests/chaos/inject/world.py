"""The world of a round: an agent of its own with a registry beside it, and its processes by their roles."""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import grpc

from nodeagent.api import runtime_pb2 as pb
from tests.chaos.oracles import Footprint
from tests.support import artifacts, images, leaks
from tests.support.node import PATIENCE_SECONDS, RunningAgent, wait_for
from tests.support.registry import Registry, fill

# No pod is prepared in advance, or the calls that a request makes would not be its own.
CONFIG = "slots = 0\n"

_PROFILE = artifacts.seccomp({"defaultAction": "SCMP_ACT_ALLOW"})


def stock(registry: Registry) -> None:
    """Give a registry what a world pulls."""
    fill(registry, [images.busybox(), images.pause(), _PROFILE])


class Wrong(Exception):
    """What was seen is not what must be."""


class GatedAgent(RunningAgent):
    """An agent that waits, with all its modules, until `let_go`: so that its start can be traced.

    code: as in `RunningAgent`; the tests are beside the package.
    """

    def __init__(self, root: Path, code: Path | None = None) -> None:
        super().__init__(root, config=CONFIG)
        self.code = code
        self._gate = root / "gate"
        os.mkfifo(self._gate)
        self.is_held = False

    def command(self, verb: str, *arguments: str) -> list[str]:
        command = super().command(verb, *arguments)
        module = command.index("nodeagent")
        gated = ["tests.chaos.inject.serve", str(self._gate)]
        return [*command[:module], *gated, *command[module + 1 :]]

    def hold(self) -> None:
        """Start the process, and return when it waits."""
        self.launch()
        self.is_held = True
        wait_for("the agent at its gate", self._is_at_gate)

    def _is_at_gate(self) -> bool:
        try:
            # Without a reader this fails (ENXIO), and does not wait for one that may never come.
            self._writer = os.open(self._gate, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO or self.exit_code is not None:
                raise
            return False
        return True

    def let_go(self) -> None:
        os.write(self._writer, b".")
        os.close(self._writer)
        self.is_held = False

    def start(self) -> None:
        if not self.is_held:
            self.hold()
        self.let_go()
        self.await_start()

    @property
    def is_there(self) -> bool:
        """Whether the process is, and has not been killed."""
        return self._process is not None and self._process.poll() is None

    def serves(self) -> bool:
        """Whether it answers now."""
        if self._channel is None:
            # It is asked before it listens: a channel that fails waits for up to two minutes without this.
            self._channel = grpc.insecure_channel(
                self.endpoint, options=[("grpc.max_reconnect_backoff_ms", 1000)]
            )
        try:
            self.runtime.Version(pb.VersionRequest(), timeout=PATIENCE_SECONDS)
        except grpc.RpcError:
            return False
        return True

    @property
    def exit_code(self) -> int | None:
        return self._process.poll() if self._process is not None else None


class World:
    """The agent, and what it had before the first round."""

    def __init__(self, folder: Path, code: Path | None = None) -> None:
        self.folder = folder
        folder.mkdir()
        self.agent = GatedAgent(folder / "agent", code)
        self.footprint = Footprint(self.agent)
        self.gate = folder / "gate"
        self.gate.mkdir(mode=0o777)
        self.before: Counter[str] = Counter()
        self.image = self.other_image = self.profile = ""

    def open(self, registry: Registry) -> None:
        """Start the agent, with its images."""
        self.agent.trust(registry.host)
        self.agent.start()
        base = images.busybox()
        self.image = f"{registry.host}/{base.repository}:{base.tags[0]}"
        other = images.pause()
        self.other_image = f"{registry.host}/{other.repository}:{other.tags[0]}"
        self.profile = _PROFILE.reference(registry.host)
        self.pull(self.image)

    def pull(self, image: str) -> None:
        request = pb.PullImageRequest(image=pb.ImageSpec(image=image))
        self.agent.images.PullImage(request, timeout=PATIENCE_SECONDS)

    def note(self, lives: Sequence[Callable[[], None]]) -> None:
        """Remember what is there after each of these lives of a pod: that is what may stay.

        What is there after one of them only is on its way out; on a busy machine that takes as long as it takes.
        """
        for life in lives:
            life()
            now = self.footprint.now()
            self.before = now & self.before if self.before else now
        if left := self.footprint.new_since(self.before):
            raise Wrong(f"left without any fault: {left}")

    # --- processes ---

    @property
    def launcher(self) -> int:
        return self._find(f"nodeagent.sandbox.launcher {self.folder}/agent/run")

    def supervisor(self, pod_id: str) -> int:
        return self._find(f"nodeagent.sandbox.supervisor {pod_id}")

    def _find(self, command: str) -> int:
        return first_of(
            {
                pid: parent
                for pid, parent in leaks.processes().items()
                if leaks.command(pid).startswith(command)
            }
        )

    def members(self) -> list[int]:
        """The launcher, and all that it made."""
        name = f"{self.footprint.cgroup}/"
        everybody = leaks.processes()
        return [pid for pid in everybody if name in leaks.read(f"/proc/{pid}/cgroup").decode()]

    def go_on(self) -> None:
        """Let all go on that have been stopped."""
        for pid in (*self.members(), *([self.agent.pid] if self.agent.is_there else [])):
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                pass

    def heal(self) -> None:
        """Let all go on, and start the agent if it has died, or was killed."""
        self.go_on()
        if not self.agent.is_there:
            self.agent.kill()
            self.agent.start()
        wait_for("a launcher", lambda: bool(self.launcher))

    def close(self) -> None:
        """Take everything down, as far as that is possible. After a fault that was found, it may not be."""
        self.go_on()
        try:
            if not self.agent.is_there:
                self.agent.kill()
                self.agent.start()
            for pod in self.agent.runtime.ListPodSandbox(
                pb.ListPodSandboxRequest(), timeout=PATIENCE_SECONDS
            ).items:
                request = pb.RemovePodSandboxRequest(pod_sandbox_id=pod.id)
                self.agent.runtime.RemovePodSandbox(request, timeout=PATIENCE_SECONDS)
            self.agent.stop()
        finally:
            self._tear_down()

    def _tear_down(self) -> None:
        if self.agent.is_there:
            self.agent.kill()
        for pid in self.members():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        wait_for("the end of what was killed", lambda: not self.members())
        self.footprint.tear_down()


def first_of(parents: Mapping[int, int]) -> int:
    """Of processes of one name, the one that is no other's child: a fork has the name of its parent until it execs."""
    return next((pid for pid, parent in parents.items() if parent not in parents), 0)
