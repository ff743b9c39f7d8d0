"""Simulate seeds until one is what a pattern says: ``python -m tests.chaos.old_bugs.simulate FIRST COUNT PATTERN``."""

import re
import sys

from tests.chaos.simulation import campaign


def main() -> int:
    first, count, pattern = sys.argv[1:]
    seeds = range(int(first), int(first) + int(count))
    with campaign.ready() as directory:
        for seed, outcome in campaign.failures(seeds, directory):
            print(f"seed {seed}: {outcome.violation}", flush=True)
            if re.search(pattern, outcome.violation):
                return 0
    return 2


if __name__ == "__main__":
    sys.exit(main())
