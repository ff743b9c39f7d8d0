"""`make power`: power losses at length, on three rungs, and what was found.

python -m tests.chaos.power [--seed N] [--steps N] [--seconds N] [--damages N] [--cuts N]
"""

import argparse
import asyncio
import logging
import random
import sys
from pathlib import Path

from tests.chaos.power import damage, defects, machine
from tests.chaos.power.losses import try_losses
from tests.chaos.power.walk import agent_of, walked
from tests.support.registry import running_registry
from tests.support.scratch import scratch


def main() -> int:
    parser = argparse.ArgumentParser(prog="power", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--steps", type=int, default=120, help="of the walk")
    parser.add_argument("--seconds", type=float, default=1200, help="for the states of its disk")
    parser.add_argument("--damages", type=int, default=1000, help="of a database")
    parser.add_argument("--cuts", type=int, default=10, help="of a guest's power; 0 for none")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    logging.getLogger("nodeagent").setLevel(logging.CRITICAL)
    with scratch("power-", "/var/tmp") as folder:
        violations = _run(options, folder)
    for violation in violations:
        print(violation)
    return 1 if violations else 0


def _run(options: argparse.Namespace, folder: Path) -> list[str]:
    violations: list[str] = []
    with running_registry(folder / "registry") as registry:
        for number, defect in enumerate(defects.DEFECTS):
            place = folder / f"defect{number}"
            place.mkdir()
            found = asyncio.run(defects.is_found(defect, place, registry))
            print(f"a product in which {defect}: {'found' if found else 'NOT FOUND'}", flush=True)
            violations += [] if found else [f"{defect}: not found"]
        chance = random.Random(options.seed)
        with agent_of(folder, registry) as agent:
            recording = walked(agent, registry, folder, options.steps, chance)
        losses = asyncio.run(
            try_losses(recording, chance=chance, states=6, seconds=options.seconds)
        )
    print(
        f"power losses: {len(recording.steps)} requests, {recording.sequences} sequences of three, "
        f"{losses.points} of {len(recording.calls)} points, {losses.states} states of the disk, "
        f"{len(losses.violations)} violations",
        flush=True,
    )
    tried = damage.try_damages(options.seed, count=options.damages, seconds=options.seconds)
    print(f"damaged databases: {tried}, {len(tried.violations)} violations", flush=True)
    violations += [*losses.violations, *tried.violations]
    if options.cuts:
        cuts = machine.cut_power(folder, options.cuts, chance)
        print(
            f"a machine's power cut: {cuts.boots} boots after {cuts.steps} requests, "
            f"{len(cuts.violations)} violations",
            flush=True,
        )
        violations += cuts.violations
    return violations


if __name__ == "__main__":
    sys.exit(main())
