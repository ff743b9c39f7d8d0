"""Prints how the agent's answers differ from containerd's: `make differential`.

    python -m tests.chaos.differential [CASE | SEED]...

A number is the seed of a random walk. Rows that docs/differences.md lacks are marked with +, those of it that are not
true any more with -.
"""

from __future__ import annotations

import os
import sys

from tests.chaos.differential.cases import CASES
from tests.chaos.differential.compare import DOCUMENT, documented, pair, run
from tests.chaos.differential.walk import every_state, walk
from tests.support.registry import running_registry
from tests.support.scratch import scratch


def main(names: list[str]) -> int:
    seeds = [int(name) for name in names if name.isdecimal()]
    chosen = [case for case in CASES if case.__name__ in names] + [walk(seed) for seed in seeds]
    chosen = chosen or [*CASES, every_state]
    known = documented(DOCUMENT.read_text()) if DOCUMENT.exists() else set()
    with scratch("differential-") as folder:
        root = folder
        with running_registry(root / "registry") as registry, pair(root, registry) as callers:
            found = run(chosen, callers)
    for row in sorted(found - known):
        print(f"+ {row}")
    for row in sorted(known - found) if not names else ():
        print(f"- {row}")
    print(f"{len(chosen)} cases: {len(found)} differences, {len(found - known)} unknown")
    return min(len(found ^ known), 1)


if __name__ == "__main__":
    os.environ.setdefault("NODEAGENT_TEST_RUN", f"differential-{os.getpid()}")
    sys.exit(main(sys.argv[1:]))
