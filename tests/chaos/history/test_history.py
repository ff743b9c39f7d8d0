"""One short run of clients under faults, of a seed that it prints: its history is one that a CRI runtime may have."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.chaos import seeds
from tests.chaos.history.__main__ import report
from tests.chaos.history.program import Step
from tests.chaos.history.run import Script, run, script
from tests.chaos.history.shrink import Budget, shrink
from tests.support.node import PATIENCE_SECONDS
from tests.support.registry import Registry
from tests.support.scratch import scratch

CALLS = 400
EVERY = 40  # calls for one fault


# However slow the machine is: it makes so many calls, each of which may take PATIENCE_SECONDS at most.
@pytest.mark.timeout(900)
def test_a_history(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    seed = seeds.of_this_run()
    wanted = script(seed, CALLS, EVERY)
    # Not below the directory of the run, whose name makes paths of sockets long.
    with scratch("na-test-history-", "/tmp") as root:
        outcome = run(wanted, root / "a", registry, PATIENCE_SECONDS)
    with capsys.disabled():
        print(f"\nhistory: seed {seed}: {dict(outcome.counts)}, {outcome.seconds:.0f} s")
        if outcome.violations:
            report(seed, wanted, outcome, Path(tempfile.gettempdir()))
    assert not outcome.violations, f"seed {seed}"


def test_a_program_is_that_of_its_seed() -> None:
    assert script(7, CALLS, EVERY) == script(7, CALLS, EVERY)
    assert script(7, CALLS, EVERY) != script(8, CALLS, EVERY)


def test_a_failure_becomes_short() -> None:
    """One client, one fault and two steps are what it takes."""
    wanted = script(7, CALLS, EVERY)
    guilty, second = wanted.programs[3][5], wanted.programs[3][30]
    fault = wanted.plans[4]
    tried = 0

    def fails(shorter: Script) -> bool:
        nonlocal tried
        tried += 1
        steps: list[Step] = shorter.programs.get(3, [])
        kinds = [(plan.kind, plan.choice) for plan in shorter.plans]
        has_fault = (fault.kind, fault.choice) in kinds
        return guilty in steps and second in steps and has_fault

    short = shrink(wanted, Budget(200, fails))
    assert list(short.programs) == [3]
    assert [guilty, second] == short.programs[3]
    assert [plan.choice for plan in short.plans] == [fault.choice]
    assert tried <= 200
    assert shrink(wanted, Budget(0, fails)) == wanted
