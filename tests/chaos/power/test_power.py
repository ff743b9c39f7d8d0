"""The state of a node after a power loss: rung (a), a sample of what `make power` does at length.

What was answered for is there and whole; the agent starts, whatever of the rest is on the disk.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest

import nodeagent
from tests.chaos import seeds
from tests.chaos.power import damage, disk, trace, trees
from tests.chaos.power.defects import DEFECTS
from tests.chaos.power.disk import Disk, Name, Write, apply
from tests.chaos.power.losses import try_losses
from tests.chaos.power.walk import Recording, agent_of, walked
from tests.support.registry import Registry

STEPS, STATES, SECONDS = 12, 4, 15.0

needs_strace = pytest.mark.skipif(trace.strace() is None, reason="strace is not installed")


@needs_strace
async def test_power_losses_during_a_walk(tmp_path: Path, registry: Registry) -> None:
    seed = seeds.of_this_run()
    print(f"seed {seed}")
    chance = random.Random(seed)
    with agent_of(tmp_path, registry) as agent:
        recording = walked(agent, registry, tmp_path, STEPS, chance)
    assert differences(recording) == [], "the model has not seen all"
    found = await try_losses(recording, chance=chance, states=STATES, seconds=SECONDS)
    print(f"{found.states} states at {found.points} of {len(recording.calls)} points")
    assert found.violations == [], f"seed {seed}"
    assert found.states > 20


def differences(recording: Recording) -> list[str]:
    """The paths of which the model, at the end of the calls, does not agree with the real files.

    What containers write, and what is moved out of the way or removed just now, nobody but the agent has to know.
    """
    model = copy.deepcopy(recording.disk)
    for call in recording.calls:
        model.take(call)
    real, known = recording.left, trees.tree(model.now)
    others = ("staging/", "trash/", "state.db-shm", "containers/")
    return [
        path
        for path in sorted(real.keys() | known.keys())
        if real.get(path, 0) != known.get(path, 0) and not path.startswith(others)
    ]


async def test_a_damaged_database_sample() -> None:
    """Rung (c): whatever is overwritten in a database, it is opened, or refused and repaired."""
    seed = seeds.of_this_run()
    tried = damage.try_damages(seed, count=40, seconds=15)
    print(f"seed {seed}: {tried}")
    assert tried.violations == [], f"seed {seed}"


# --- the model ---


def model_of(folder: Path) -> Disk:
    (folder / "d").mkdir()
    (folder / "d/f").write_bytes(b"old")
    return Disk(folder)


def outcomes(model: Disk, path: str) -> set[object]:
    states = (model.after_power_loss(random.Random(number)) for number in range(300))
    return {trees.tree(nodes).get(path, "absent") for nodes in states}


def call(began: float, name: str, *arguments: str) -> trace.Call:
    return trace.Call(began, began + 0.5, name, list(arguments), 0, "")


def hexadecimal(text: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in text.encode())


def test_a_file_that_is_replaced_without_a_sync_may_be_empty(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    new = model._enter(call(1, "openat"), f"{tmp_path}/d/new", disk.Node("file"))
    model._do(call(2, "write"), Write(new, 0, b"new"))
    model._move(call(3, "rename"), f"{tmp_path}/d/new", f"{tmp_path}/d/f")
    assert outcomes(model, "d/f") == {b"old", b"new", b""}
    file = f"3<{hexadecimal(f'{tmp_path}/d/f')}>"
    model.take(call(4, "fsync", file))
    assert outcomes(model, "d/f") == {b"old", b"new"}
    model.take(call(5, "fsync", f"3<{hexadecimal(f'{tmp_path}/d')}>"))
    assert outcomes(model, "d/f") == {b"new"}


def test_sectors_of_one_write_are_independent_until_all_is_synced(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    inode = model.find(f"{tmp_path}/d/f")
    model._do(call(1, "write"), Write(inode, 0, b"a" * 512 + b"b" * 512))
    found = outcomes(model, "d/f")
    assert found >= {b"old", b"a" * 512 + b"b" * 512, b"a" * 512}
    assert b"old" + bytes(509) + b"b" * 512 in found
    model.take(call(2, "syncfs", f"3<{hexadecimal(str(tmp_path))}>"))
    assert outcomes(model, "d/f") == {b"a" * 512 + b"b" * 512}


def test_what_comes_while_a_sync_runs_is_not_covered_by_it(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    inode = model.find(f"{tmp_path}/d/f")
    model._do(call(1, "write"), Write(inode, 0, b"new"))
    model.take(call(1.2, "syncfs", f"3<{hexadecimal(str(tmp_path))}>"))
    assert outcomes(model, "d/f") == {b"old", b"new"}


def test_names_go_to_the_disk_in_their_order(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    for number, name in enumerate("abc"):
        model._enter(call(number, "mkdir"), f"{tmp_path}/{name}", disk.Node("directory"))
    states = {
        tuple(trees.tree(model.after_power_loss(random.Random(number)))) for number in range(300)
    }
    assert {len(state) for state in states} == {2, 3, 4, 5}
    assert all(state[2:] == tuple("abc")[: len(state) - 2] for state in states)


def test_a_lost_disk_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    inode = model.find(f"{tmp_path}/d/f")
    model._do(call(1, "write"), Write(inode, 0, b"new"))
    outcomes(model, "d/f")
    assert model.safe[inode].data == b"old"
    apply(model.safe, Name(disk.ROOT, "d", 0))
    assert trees.tree(model.safe) == {}


def test_the_missing_syncs_are_syncs_of_the_product() -> None:
    """`make power` takes each away, by its text."""
    package = Path(nodeagent.__file__).parent
    for file, text, _ in DEFECTS.values():
        assert (package / file).read_text().count(text) == 1, text
