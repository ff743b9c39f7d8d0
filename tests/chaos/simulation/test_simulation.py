"""The simulation of the node: nothing is violated, and the same seed is the same run."""

import os
import subprocess
import sys

import pytest

from tests.chaos import seeds
from tests.chaos.simulation import campaign

pytestmark = pytest.mark.timeout(900)  # of a machine that has more to do

SEEDS = 600


def test_nothing_is_violated() -> None:
    """In processes of their own: a run depends on the hash seed of its process, and replaces kernel calls in it."""
    first = seeds.of_this_run()
    failing, _ = campaign.run_apart(first, SEEDS, jobs=1)
    assert not failing, (
        f"{seeds.VARIABLE}={first}: repeat each by: python -m tests.chaos.simulation --seed N; failing: {failing}"
    )


DIGESTS = """
import sys
from tests.chaos.simulation import campaign, plan, run
with campaign.ready() as directory:
    for seed in map(int, sys.argv[1:]):
        print(run.run_plan(plan.make(seed), directory).digest)
"""


def test_the_same_seed_is_the_same_run() -> None:
    seeds = list(map(str, range(1, 40)))
    runs = [
        subprocess.run(
            [sys.executable, "-c", DIGESTS, *order],
            env={**os.environ, "PYTHONHASHSEED": campaign.HASH_SEED},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for order in (seeds, seeds[::-1])
    ]
    assert runs[0] == runs[1][::-1]
    assert len(set(runs[0])) == len(seeds)
