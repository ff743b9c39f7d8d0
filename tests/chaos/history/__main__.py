"""Runs of random CRI programs under faults, with a verdict on each: `make history SECONDS=… SEED=…`.

    python -m tests.chaos.history [--seconds 60] [--seed N] [--calls 2000] [--keep DIRECTORY] [--shrink 12]
    python -m tests.chaos.history --judge HISTORY

Prints counts after each run. What fails is written to a history, which `--judge` decides on again, and made shorter.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from tests.chaos import seeds
from tests.chaos.history.model import Model, Violation
from tests.chaos.history.record import load
from tests.chaos.history.run import Outcome, Script, run, script
from tests.chaos.history.shrink import Budget, shrink
from tests.support import images
from tests.support.registry import Registry, running_registry
from tests.support.scratch import scratch

EVERY = 60  # calls for one fault
SHOWN = 10
SHOWN_STEPS = 60  # of a client


def main() -> int:
    options = _options()
    if options.judge:
        return _print(Model(load(options.judge)).violations())
    print(f"history: seed {options.seed}, commit {seeds.commit()}", flush=True)
    failed, total, number = 0, Counter[str](), 0
    with ExitStack() as stack:
        root = stack.enter_context(scratch("history-"))
        registry = stack.enter_context(running_registry(root / "registry"))
        registry.push(images.busybox())
        begin = time.monotonic()
        while number == 0 or time.monotonic() - begin < options.seconds:
            seed = options.seed + number
            number += 1
            wanted = script(seed, options.calls, options.every)
            outcome = run(wanted, root / f"a{number}", registry)
            total += outcome.counts
            seconds = time.monotonic() - begin
            counts = ", ".join(f"{value} {name}" for name, value in sorted(total.items()))
            speed = total["calls"] / seconds
            print(f"{seconds:.0f} s, {number} runs: {counts}; {speed:.0f} calls/s", flush=True)
            print(f"    seed {seed}; longest fault: {outcome.longest}", flush=True)
            if outcome.violations:
                failed += 1
                report(seed, wanted, outcome, options.keep)
                if options.shrink:
                    report_shorter(wanted, outcome, root, registry, options.shrink)
    return min(failed, 1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--calls", type=int, default=2000, help="of one run (default 2000)")
    parser.add_argument("--every", type=int, default=EVERY, help="calls for one fault")
    parser.add_argument("--shrink", type=int, default=12, help="runs to make a failure shorter")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()), help="histories")
    parser.add_argument("--judge", type=Path, help="a history of before")
    return parser.parse_args()


def report(seed: int, wanted: Script, outcome: Outcome, directory: Path) -> None:
    """Say what is needed to see it again."""
    path = directory / f"failed-{seed}.jsonl"
    outcome.history.save(path)
    print(
        f"FAILED: seed {seed}, {wanted.calls} calls, commit {seeds.commit()}; the history is {path}"
    )
    _print(outcome.violations)


def report_shorter(
    wanted: Script, outcome: Outcome, root: Path, registry: Registry, runs: int
) -> None:
    """Print a short program that breaks the same rules."""
    rules = {violation.rule for violation in outcome.violations}
    number = 0

    def fails(shorter: Script) -> bool:
        nonlocal number
        number += 1
        again = run(shorter, root / f"s{time.time_ns()}", registry)
        return bool(rules & {violation.rule for violation in again.violations})

    shorter = shrink(wanted, Budget(runs, fails))
    print(f"shorter, after {number} runs: {shorter.calls} calls, {len(shorter.plans)} faults")
    for plan in shorter.plans[:SHOWN]:
        print(f"    {msgspec.json.encode(plan).decode()}")
    for client, steps in shorter.programs.items():
        for step in steps[:SHOWN_STEPS]:
            print(f"    client {client}: {msgspec.json.encode(step).decode()}")
    sys.stdout.flush()


def _print(violations: Sequence[Violation]) -> int:
    rules = Counter(violation.rule for violation in violations)
    for violation in violations[: 2 * SHOWN]:
        print(f"    {violation}")
    print(f"{len(violations)} violations: {dict(rules)}", flush=True)
    return min(len(violations), 1)


if __name__ == "__main__":
    os.environ.setdefault("NODEAGENT_TEST_RUN", f"history-{os.getpid()}")
    sys.exit(main())
