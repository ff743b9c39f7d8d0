"""Many runs: seeds in processes, each of which has a directory of its own; a failure is made shorter and printed.

The order of a set of texts depends on PYTHONHASHSEED, which a process has from its start: whoever wants to repeat a run
starts one with `HASH_SEED`.
"""

import gc
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tests.chaos import seeds
from tests.chaos.simulation import plan as plans
from tests.chaos.simulation.boundaries import patched
from tests.chaos.simulation.plan import Plan
from tests.chaos.simulation.run import Outcome, run_plan

HASH_SEED = "0"
COLLECT_EVERY = 100


@contextmanager
def ready() -> Iterator[Path]:
    """Prepare this process for runs; gives a directory for them, in memory where there is a file system for that."""
    logger = logging.getLogger("nodeagent")
    level, propagates = logger.level, logger.propagate
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="na-simulation-", dir=memory) as directory, patched():
        logger.setLevel(logging.ERROR)
        logger.propagate = False
        silent = logging.NullHandler()
        logger.addHandler(silent)
        gc.collect()
        gc.freeze()
        gc.disable()  # or destructors would run at moments that no seed decides
        try:
            yield Path(directory)
        finally:
            gc.enable()
            gc.unfreeze()
            logger.removeHandler(silent)
            logger.setLevel(level)
            logger.propagate = propagates


def failures(seeds: Sequence[int], directory: Path) -> Iterator[tuple[int, Outcome]]:
    """Run seeds, in this process; gives those that violate something."""
    for number, seed in enumerate(seeds, 1):
        outcome = run_plan(plans.make(seed), directory)
        if outcome.violation:
            yield seed, outcome
        if number % COLLECT_EVERY == 0:
            gc.collect()


def shrunk(plan: Plan, directory: Path) -> Plan:
    """A plan that fails in the same way, of which nothing can be left out."""
    kind = _kind(run_plan(plan, directory).violation)
    progress = True
    while progress:
        progress = False
        for smaller in _smaller(plan):
            if _kind(run_plan(smaller, directory).violation) == kind:
                plan, progress = smaller, True
                break
    return plan


def _kind(violation: str) -> str:
    """What a violation is about, without the ids in it."""
    return " ".join(word for word in violation.split()[:8] if not any(c.isdigit() for c in word))


def _smaller(plan: Plan) -> Iterator[Plan]:
    for number in range(len(plan.programs)):
        yield replace(plan, programs=plan.programs[:number] + plan.programs[number + 1 :])
    for number in range(len(plan.faults)):
        yield replace(plan, faults=plan.faults[:number] + plan.faults[number + 1 :])
    for client, program in enumerate(plan.programs):
        for number in range(len(program)):
            shorter = program[:number] + program[number + 1 :]
            yield replace(
                plan, programs=[*plan.programs[:client], shorter, *plan.programs[client + 1 :]]
            )


def told(seed: int, directory: Path) -> str:
    """All about a seed that fails: its plan made short, the trace of that, and how to repeat it."""
    plan = shrunk(plans.make(seed), directory)
    outcome = run_plan(plan, directory, is_traced=True)
    trace = "\n".join(outcome.lines[-200:])
    return (
        f"{plan}\n\n{trace}\n\n{outcome.violation}\n\n"
        f"commit {seeds.commit()}; repeat: python -m tests.chaos.simulation --seed {seed}"
    )


def run_apart(first: int, count: int, jobs: int) -> tuple[list[int], float]:
    """Run seeds in processes of their own. Returns those that fail, and how long it took, in seconds."""
    began = time.monotonic()
    share = -(-count // jobs)
    ranges = [
        (start, min(share, first + count - start)) for start in range(first, first + count, share)
    ]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.simulation", "--worker", str(start), str(size)],
            env={**os.environ, "PYTHONHASHSEED": HASH_SEED},
            stdout=subprocess.PIPE,
            text=True,
        )
        for start, size in ranges
    ]
    failing: list[int] = []
    for process in running:
        output, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"a worker has failed: {process.returncode}")
        failing += [int(line) for line in output.splitlines()]
    return failing, time.monotonic() - began
