"""A walk over what a node is asked for, on a real agent whose calls to the kernel are recorded.

It takes whatever leads to a sequence of three that it has not had yet, until it has had them all, or enough.
"""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from nodeagent.api import runtime_pb2 as pb
from tests.chaos.power import trace, trees
from tests.chaos.power.disk import Disk
from tests.chaos.power.trace import Call
from tests.support import images
from tests.support.cri import Container, Cri, Pod
from tests.support.images import Tree, layer
from tests.support.node import PATIENCE_SECONDS, RunningAgent
from tests.support.registry import Registry

_BASE = layer(Tree().file("pause", images.compiled(images.PAUSE), 0o755).file("etc/base", b"base"))
_CONFIG = {"Entrypoint": ["/pause"]}


def _image(name: str, host: str = "") -> images.Image:
    """An image with a layer of its own over one that all of them have."""
    own = Tree().symlink(f"{name}/link", "file").file(f"{name}/file", name.encode() * 3000)
    return images.Image(f"{host}power/{name}", ("1",), (_BASE, layer(own)), _CONFIG)


PULLED, LOADED = ("first", "second"), "loaded"


@dataclass(frozen=True, slots=True)
class Step:
    """One request. image: the one that it is about, if any."""

    verb: str
    image: str
    began: float
    ended: float


@dataclass(slots=True)
class Recording:
    """What is known of a walk: the disk at its beginning, what the agent did, and what it was asked for.

    names: references by the names of the images in the steps. left: the files at the end of the calls.
    """

    disk: Disk
    names: dict[str, str]
    left: trees.Tree = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    @property
    def sequences(self) -> int:
        """How many different sequences of three verbs there are."""
        verbs = [step.verb for step in self.steps]
        return len(set(zip(verbs, verbs[1:], verbs[2:], strict=False)))


class Walk:
    """The state of the node as the client knows it, and the verbs that it allows."""

    def __init__(
        self, agent: RunningAgent, registry: Registry, folder: Path, host: str = ""
    ) -> None:
        """Take an agent. host: the name by which it knows the registry."""
        host = host or registry.host
        self.names = {name: f"{host}/power/{name}:1" for name in (*PULLED, LOADED)}
        self.agent = agent
        self.cri = Cri(agent, self.names[PULLED[0]], folder / "logs")
        self.here: set[str] = set()
        self.pod: Pod | None = None
        self.container: Container | None = None
        self.state = ""
        for name in PULLED:
            registry.push(_image(name))
        self.archive = folder / "archive.tar"
        images.write_archive(_image(LOADED, f"{host}/"), self.archive)

    def verbs(self) -> dict[str, tuple[str, Callable[[], object]]]:
        """What can be asked for now: by verb, the image that it is about, and the call."""
        found: dict[str, tuple[str, Callable[[], object]]] = {}
        for name in sorted(set(PULLED) - self.here, reverse=True):
            found["pull"] = name, partial(self.pull, name)
        if LOADED not in self.here:
            found["load"] = LOADED, self.load
        for name in sorted(self.here):
            found["remove image"] = name, partial(self.remove_image, name)
        if self.pod is None:
            found["run"] = "", self.run
        else:
            found["remove"] = "", self.remove
            if self.container is None and PULLED[0] in self.here:
                found["create"] = "", self.create
        if self.container is not None:
            if self.state == "created":
                found["start"] = "", self.start
            if self.state in ("created", "running"):
                found["stop"] = "", self.stop
        return found

    def pull(self, name: str) -> None:
        request = pb.PullImageRequest(image=pb.ImageSpec(image=self.names[name]))
        self.agent.images.PullImage(request, timeout=PATIENCE_SECONDS)
        self.here.add(name)

    def load(self) -> None:
        subprocess.run(
            self.agent.command("image load", str(self.archive)),
            check=True,
            capture_output=True,
            timeout=PATIENCE_SECONDS,
        )
        self.here.add(LOADED)

    def remove_image(self, name: str) -> None:
        request = pb.RemoveImageRequest(image=pb.ImageSpec(image=self.names[name]))
        self.agent.images.RemoveImage(request, timeout=PATIENCE_SECONDS)
        self.here.discard(name)

    def run(self) -> None:
        self.pod = self.cri.pod()

    def create(self) -> None:
        assert self.pod is not None
        self.container, self.state = self.pod.container("/pause"), "created"

    def start(self) -> None:
        assert self.container is not None
        self.container.start()
        self.state = "running"

    def stop(self) -> None:
        assert self.container is not None
        self.container.stop()
        self.state = "stopped"

    def remove(self) -> None:
        """Remove the container, if there is one, else the pod."""
        if self.container is not None:
            self.container.remove()
            self.container = None
        elif self.pod is not None:
            self.pod.remove()
            self.pod = None


@contextmanager
def agent_of(folder: Path, registry: Registry, code: Path | None = None) -> Iterator[RunningAgent]:
    agent = RunningAgent(folder / "agent")
    agent.code = code
    agent.trust(registry.host)
    agent.start()
    try:
        yield agent
        agent.remove_pods()
    finally:
        agent.stop()


def walked(
    agent: RunningAgent, registry: Registry, folder: Path, steps: int, chance: random.Random
) -> Recording:
    """Walk, and record what the agent does meanwhile."""
    walk = Walk(agent, registry, folder)
    with ExitStack() as stands:
        # No call is made between the look at the files and the record, at the beginning and at the end.
        stands.enter_context(trace.stopped(agent.pid))
        recording = Recording(Disk(agent.root / "lib"), walk.names)
        with trace.recorded(agent.pid, folder / "trace") as recording.calls:
            stands.close()
            _walk(walk, recording, steps, chance)
            stands.enter_context(trace.stopped(agent.pid))
        recording.left = trees.tree_of(agent.root / "lib")
    return recording


def _walk(walk: Walk, recording: Recording, steps: int, chance: random.Random) -> None:
    seen: dict[tuple[str, ...], int] = {}
    for _ in range(steps):
        verbs = walk.verbs()
        last = tuple(step.verb for step in recording.steps[-2:])
        fewest = min(seen.get((*last, verb), 0) for verb in verbs)
        verb = chance.choice(sorted(v for v in verbs if seen.get((*last, v), 0) == fewest))
        seen[*last, verb] = fewest + 1
        image, call = verbs[verb]
        began = time.time()
        call()
        recording.steps.append(Step(verb, image, began, time.time()))
