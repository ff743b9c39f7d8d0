"""Prints what each gray failure does: step × fault × outcome, and what the neighbours see of it.

    python -m tests.chaos.gray [--hold SECONDS] [--rounds N] [--files N] [FAULT...]

Exits with 1 where something is not as it must be: a neighbour was held up or failed, a call had no clear answer, or no
answer at all within `hold` seconds, or something was left.
"""

import argparse
import sys
from pathlib import Path

from tests.chaos import command
from tests.chaos.gray import trial
from tests.chaos.gray.faults import FAULTS, Fault
from tests.chaos.gray.trial import Report
from tests.chaos.gray.world import world
from tests.support import images
from tests.support.registry import Registry

MOST_TIMES = 2.0
LIST_SECONDS = 0.010


def main() -> int:
    options = parsed()

    def is_wrong(fault: Fault, folder: Path, registry: Registry) -> bool:
        return show(tried(fault, registry, folder, options))

    pushed = (images.busybox(), images.bench_pull())
    return command.play("faults", FAULTS, options.fault, pushed, is_wrong)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    # Longer than whoever creates or starts a container waits until he is told what holds it up.
    parser.add_argument("--hold", type=float, default=120, help="seconds that a fault lasts")
    parser.add_argument("--rounds", type=int, default=15, help="of the neighbours' calls")
    parser.add_argument("--files", type=int, default=1_000_000, help="to be removed")
    parser.add_argument("fault", nargs="*", help="parts of the names of those to try")
    return parser.parse_args()


def tried(fault: Fault, registry: Registry, folder: Path, options: argparse.Namespace) -> Report:
    folder.mkdir()
    agent, volume = folder / "agent", folder / "volume"
    volume.mkdir()
    with world(agent, registry, on_disk=fault.on_disk, files=options.files) as made:
        return trial.run(fault, made, volume, rounds=options.rounds, hold=options.hold)


def show(report: Report) -> bool:
    """Print a fault; returns whether something is wrong."""
    fault = report.fault
    wrong = [*report.complaints, *measured(report)]
    if fault.stops != "everything":
        wrong += [
            f"no answer in {outcome.seconds:.0f} s: {outcome.step}"
            for outcome in report.during
            if outcome.code is None and outcome.step not in trial.LONG
        ]
    print(f"\n{fault.name}: {'NOT as it must be' if wrong else 'as it must be'}")
    for during, after in zip(report.during, report.after, strict=True):
        later = "" if during.code else f"; then {after}"
        print(f"  {during.step:26} {during}{later}")
    if report.meanwhile.seconds:
        ratios = ", ".join(f"{call} {ratio:.1f}" for call, ratio in report.ratios.items())
        lists = report.meanwhile.median("ListContainers") * 1000
        longest = f"longest {report.meanwhile.longest:.2f} s, {report.meanwhile.slowest}"
        print(f"  neighbours: {report.ratio:.2f} × ({longest}): {ratios}")
        print(f"  ListContainers {lists:.1f} ms")
    print(f"  agent {report.memory_mib:+.1f} MiB; removed in {report.removed_after:.2f} s")
    print(*(f"  ! {each}" for each in wrong), sep="\n", end="\n" if wrong else "", flush=True)
    return bool(wrong)


def measured(report: Report) -> list[str]:
    """What only a machine that does nothing else can show."""
    if not report.meanwhile.seconds or report.fault.is_traced:
        return []
    wrong = []
    if report.ratio > MOST_TIMES:
        wrong.append(f"neighbours take {report.ratio:.2f} times as long")
    if report.meanwhile.median("ListContainers") > LIST_SECONDS:
        wrong.append("ListContainers takes longer than 10 ms")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
