"""Power losses during a recorded walk: at each point some states of the disk, and what an agent makes of each."""

from __future__ import annotations

import copy
import os
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.power import disk, reboot, trees
from tests.chaos.power.disk import Disk
from tests.chaos.power.reboot import Expected
from tests.chaos.power.trees import Tree
from tests.chaos.power.walk import Recording

# Where fsync costs nothing; None is the usual place.
SHARED_MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
MOST_VIOLATIONS = 10


@dataclass(slots=True)
class Losses:
    """What was tried. violations: what, and how to find it again."""

    points: int = 0
    states: int = 0
    violations: list[str] = field(default_factory=list)


def layers_of(recording: Recording) -> dict[str, Tree]:
    """The content of each layer, by chain ID, as it was when its image was answered for."""
    found: dict[str, Tree] = {}
    model = copy.deepcopy(recording.disk)
    steps = [step for step in recording.steps if step.image]
    for call in recording.calls:
        while steps and steps[0].ended < call.ended:
            steps.pop(0)
            _note_layers(model, found)
        model.take(call)
    _note_layers(model, found)
    return found


def _note_layers(model: Disk, found: dict[str, Tree]) -> None:
    directory = model.find(f"{model.root}/layers")
    for name, inode in model.now[directory].entries.items():
        found.setdefault(f"sha256:{name}", trees.tree(model.now, inode))


def expected(recording: Recording, layers: dict[str, Tree], at: float) -> Expected:
    """What is promised at a moment."""
    present: set[str] = set()
    absent = set(recording.names.values())
    for step in recording.steps:
        if not step.image or step.began > at:
            continue
        name = recording.names[step.image]
        absent.discard(name)
        if step.verb == "remove image" or step.ended > at:
            present.discard(name)
        else:
            present.add(name)
    return Expected(present=frozenset(present), absent=frozenset(absent), layers=layers)


async def try_losses(
    recording: Recording, *, chance: random.Random, states: int, seconds: float
) -> Losses:
    """Cut the power at all points of a walk; at so many that it takes `seconds`, spread over the walk, if that is less.

    states: how many disks are tried at each point.
    """
    found, layers, began = Losses(), layers_of(recording), time.monotonic()
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as folder:
        model = copy.deepcopy(recording.disk)
        for point, call in enumerate(recording.calls):
            model.take(call)
            # Of the points that are left, as many as there is time for at the speed so far.
            used = time.monotonic() - began
            affordable = (seconds - used) / max(used, 0.01) * found.points
            if found.points and chance.random() > affordable / (len(recording.calls) - point):
                continue
            found.points += 1
            promised = expected(recording, layers, call.ended)
            for draw in range(states):
                found.states += 1
                nodes = model.after_power_loss(random.Random(f"{point}/{draw}"))
                verbs = [step.verb for step in recording.steps if step.began < call.ended][-2:]
                found.violations += [
                    f"call {point}, draw {draw}, after {' and '.join(verbs)}: {fault}"
                    for fault in await _faults(Path(folder), nodes, promised, chance)
                ]
            if len(found.violations) >= MOST_VIOLATIONS:
                break
    return found


async def _faults(
    folder: Path, nodes: disk.Nodes, promised: Expected, chance: random.Random
) -> list[str]:
    root = folder / "root"
    trees.write_out(nodes, root)
    # The index of the log is not written by calls that could be seen: after a power loss it is anything.
    index = chance.choice([None, b"", bytes(32768), chance.randbytes(32768)])
    (root / "state.db-shm").unlink(missing_ok=True)
    if index is not None:
        (root / "state.db-shm").write_bytes(index)
    return await reboot.faults(root, folder / "run", folder, promised)
