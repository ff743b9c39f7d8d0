"""Simulate the node: ``python -m tests.chaos.simulation --seeds 10000``, or ``--seed N`` to repeat one."""

import argparse
import os
import random
import sys

from tests.chaos.simulation import campaign
from tests.chaos.simulation.campaign import HASH_SEED


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.simulation", description=__doc__)
    parser.add_argument(
        "--seed", type=int, help="run this seed alone, make it shorter, and print its trace"
    )
    parser.add_argument("--seeds", type=int, default=10_000, help="how many")
    parser.add_argument("--first", type=int, help="the first of them; random otherwise")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--worker", type=int, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return _work(*given.worker)
    if given.seed is not None:
        return _repeat(given.seed)
    first = given.first if given.first is not None else random.SystemRandom().randrange(10**9)
    print(f"seeds {first} to {first + given.seeds - 1}", flush=True)
    failing, seconds = campaign.run_apart(first, given.seeds, given.jobs)
    rate = 60 * given.seeds / seconds
    print(
        f"{given.seeds} seeds in {seconds:.0f} s, {rate:.0f} a minute; {len(failing)} fail: {failing[:20]}"
    )
    return _repeat(failing[0]) if failing else 0


def _work(first: int, count: int) -> int:
    with campaign.ready() as directory:
        for seed, _ in campaign.failures(range(first, first + count), directory):
            print(seed, flush=True)
    return 0


def _repeat(seed: int) -> int:
    if os.environ.get("PYTHONHASHSEED") != HASH_SEED:
        os.environ["PYTHONHASHSEED"] = HASH_SEED
        os.execv(
            sys.executable, [sys.executable, "-m", "tests.chaos.simulation", "--seed", str(seed)]
        )
    with campaign.ready() as directory:
        failed = [seed for seed, _ in campaign.failures([seed], directory)]
        print(campaign.told(seed, directory) if failed else f"seed {seed}: nothing is violated")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
