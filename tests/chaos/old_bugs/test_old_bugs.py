"""Today's harnesses find the faults of `bugs.py`, each by its own oracle, with what it plays in `make test`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.gray import trial as gray
from tests.chaos.gray import world as gray_world
from tests.chaos.gray.faults import FAULTS
from tests.chaos.history.run import run, script
from tests.chaos.inject import rounds, scene
from tests.chaos.inject.strace import unavailable
from tests.chaos.inject.sweep import Sweep, describe
from tests.chaos.inject.test_inject import parsed
from tests.chaos.inject.world import stock
from tests.chaos.old_bugs.bugs import INJECTED, OLD_BUGS, SIMULATED, TRIED, OldBug
from tests.chaos.old_bugs.copies import copy_with
from tests.chaos.power.defects import DEFECTS
from tests.chaos.scarce import trial as scarce
from tests.chaos.scarce.shortages import SHORTAGES
from tests.chaos.simulation.campaign import HASH_SEED
from tests.conftest import IN_CI
from tests.support import images
from tests.support.registry import Registry
from tests.support.scratch import scratch

# A seed stands for another run whenever the agent changes; the first one is near one that finds the fault today.
SEEDS = 1000
# A fault is not waited for as long as a healthy agent on a busy machine: what is said of it tells that it was this one.
PATIENCE_SECONDS = 3.0
STEPS = 24  # of a history, without a fault

pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize("bug", SIMULATED, ids=lambda bug: bug.name)
def test_the_simulation_finds(bug: OldBug, tmp_path: Path) -> None:
    """In a process of its own: it needs a hash seed, and its copy of the package."""
    code = copy_with(bug.changes, tmp_path / "code")
    options = [str(bug.first), str(SEEDS), bug.says]
    found = subprocess.run(
        [sys.executable, "-P", "-m", "tests.chaos.old_bugs.simulate", *options],
        env={**os.environ, "PYTHONHASHSEED": HASH_SEED, "PYTHONPATH": str(code)},
        capture_output=True,
        text=True,
        check=False,
    )
    print(found.stdout)
    assert found.returncode == 0, found.stderr or "it is not found"


@pytest.mark.parametrize("bug", INJECTED, ids=lambda bug: bug.name)
def test_the_sweep_finds(
    bug: OldBug, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := unavailable():
        pytest.fail(reason) if IN_CI else pytest.skip(reason)
    monkeypatch.setattr(scene, "RETRY_SECONDS", PATIENCE_SECONDS)
    monkeypatch.setattr(rounds, "PATIENCE_SECONDS", PATIENCE_SECONDS)
    stock(registry)
    sweep = Sweep(tmp_path, registry, code=copy_with(bug.changes, tmp_path / "code"))
    try:
        verdict = sweep.play(parsed(bug.played))
    finally:
        sweep.renew()
    assert any(re.search(bug.says, problem) for problem in verdict.problems), describe(verdict)


@pytest.mark.parametrize("bug", TRIED, ids=lambda bug: bug.name)
def test_a_trial_finds(
    bug: OldBug, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = copy_with(bug.changes, tmp_path / "code")
    monkeypatch.setattr(gray_world, "LONGEST_SECONDS", PATIENCE_SECONDS)
    if bug.harness == "chaos (gray)":
        [fault] = [fault for fault in FAULTS if fault.name == bug.played]
        volume = tmp_path / "volume"
        volume.mkdir()
        with gray_world.world(tmp_path / "agent", registry, code=code) as world:
            complaints = gray.run(fault, world, volume, rounds=2, hold=1).complaints
    elif bug.harness == "history":
        with scratch("na-test-history-", "/tmp") as root:
            found = run(script(0, STEPS, STEPS), root / "a", registry, code=code).violations
        complaints = list(map(str, found))
    else:
        [shortage] = [shortage for shortage in SHORTAGES if shortage.name == bug.played]
        complaints = scarce.run(shortage, tmp_path / "agent", registry, code).complaints
    assert any(re.search(bug.says, complaint) for complaint in complaints), complaints


def test_the_promises_list_them() -> None:
    """The rows of docs/promises.md are these faults, and the missing syncs that `make power` finds."""
    text = (images.PROJECT / "docs/promises.md").read_text()
    section = text.partition("## Faults that are put back")[2].partition("\n## ")[0]
    listed = [line for line in section.splitlines() if line.startswith("| ")][1:]
    rows = [f"| {bug.name} | {bug.was} | {bug.harness} |" for bug in OLD_BUGS]
    rows += [f"| missing sync | {defect.capitalize()}. | power |" for defect in DEFECTS]
    assert listed == rows
    assert f"{len(OLD_BUGS)} old faults, and {len(DEFECTS)} missing syncs" in text
