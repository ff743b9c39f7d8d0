"""The same calls on an agent and on containerd, and what differs: rows of docs/differences.md without their reason."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.containerd import running_containerd
from nodeagent.api import runtime_pb2 as pb
from tests.chaos.differential.caller import Answer, Caller, clear
from tests.support import images
from tests.support.node import RunningAgent
from tests.support.registry import Registry

DOCUMENT = images.PROJECT / "docs/differences.md"
NOTHING = "–"
_ROW = re.compile(r"(?m)^\| (`.+`.*?) \| (.+?) \| (.+?) \| (.*) \|$")


@dataclass(frozen=True, slots=True, order=True)
class Difference:
    """A call, or a field of its answer, and what each of the two says."""

    call: str
    ours: str
    theirs: str

    def __str__(self) -> str:
        return f"| {self.call} | {self.ours} | {self.theirs} |"


@contextmanager
def pair(root: Path, registry: Registry) -> Iterator[tuple[Caller, Caller]]:
    """A client of an agent and one of containerd, both of which have the busybox image."""
    registry.push(images.busybox())
    busybox = images.busybox()
    reference = f"{registry.host}/{busybox.repository}:{busybox.tags[0]}"
    with ExitStack() as stack:
        agent = RunningAgent(root / "agent")
        agent.trust(registry.host)
        agent.start()
        stack.callback(agent.stop)
        address = stack.enter_context(running_containerd(root / "peer", registry))
        ours = Caller("nodeagent", agent.endpoint, reference, root / "ours")
        theirs = Caller("containerd", address, reference, root / "theirs")
        for caller in (ours, theirs):
            stack.callback(caller.close)
            stack.callback(clear, caller)
            spec = pb.ImageSpec(image=reference)
            assert caller.call("PullImage", pb.PullImageRequest(image=spec)) is not None
        yield ours, theirs


def run(
    cases: Iterable[Callable[[Caller], None]], callers: tuple[Caller, Caller]
) -> set[Difference]:
    """Run cases on both, and remove their pods; what differs."""
    pairs: list[tuple[Answer, Answer]] = []
    for case in cases:
        for caller in callers:
            caller.answers = []
            try:
                case(caller)
            finally:
                clear(caller)
        ours, theirs = (caller.answers for caller in callers)
        labels = [[answer.label for answer in answers] for answers in (ours, theirs)]
        assert labels[0] == labels[1], f"{case.__name__}: not the same calls"
        pairs += zip(ours, theirs, strict=True)
    return set(differences(pairs))


def differences(pairs: Iterable[tuple[Answer, Answer]]) -> Iterator[Difference]:
    """The codes that differ, and fields of answers: what is so in several answers is told once, without the label."""
    fields: dict[tuple[str, str, str, str], list[str]] = defaultdict(list)
    for ours, theirs in pairs:
        method, _, about = ours.label.partition(" ")
        if ours.code != theirs.code:
            yield Difference(f"`{method}` {about}", ours.code, theirs.code)
            continue
        for path, mine, other in _compared(ours.fields, theirs.fields):
            fields[method, path, mine, other].append(about)
    for (method, path, mine, other), labels in fields.items():
        where = "" if len(set(labels)) > 1 else f" {labels[0]}"
        call = f"`{method}`{where}: `{path}`"
        yield Difference(call, _cell(mine), _cell(other))


def _compared(ours: Mapping[str, str], theirs: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Fields that differ; a message that only one of them has is one difference, as is a list of another length."""
    told: set[str] = set()
    for path in sorted(ours.keys() | theirs.keys(), key=lambda path: (path.count("."), path)):
        mine, other = ours.get(path, NOTHING), theirs.get(path, NOTHING)
        if mine == other or any(path.startswith((f"{top}.", f"{top}[")) for top in told):
            continue
        top = path
        if NOTHING in (mine, other):
            lacking = theirs if other == NOTHING else ours
            top = _highest_without(path, lacking)
            if top != path:
                mine, other = (("a message", NOTHING), (NOTHING, "a message"))[lacking is ours]
        told.add(top)
        yield top, mine, other


def _highest_without(path: str, fields: Mapping[str, str]) -> str:
    """The path, or that of the highest message around it of which there is no field."""
    parts = path.split(".")
    for length in range(1, len(parts)):
        top = ".".join(parts[:length])
        if not any(other == top or other.startswith((f"{top}.", f"{top}[")) for other in fields):
            return top
    return path


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def documented(text: str) -> set[Difference]:
    """The rows of the table."""
    return {Difference(*row[:3]) for row in _ROW.findall(text)}
