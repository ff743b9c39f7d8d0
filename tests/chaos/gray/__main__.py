"""Prints what each gray failure does: step × fault × outcome, and what the neighbours see of it.

    python -m tests.chaos.gray [--hold SECONDS] [--rounds N] [--files N] [FAULT...]

Exits with 1 where something is not as it must be: a neighbour was held up or failed, a call had no clear answer, or no
answer at all within `hold` seconds, or something was left.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.chaos.gray import trial
from tests.chaos.gray.faults import FAULTS, Fault
from tests.chaos.gray.trial import Report
from tests.chaos.gray.world import world
from tests.support import images, leaks
from tests.support.registry import Registry, running_registry

MOST_TIMES = 2.0
LIST_SECONDS = 0.010


def main() -> int:
    options = parsed()
    folder = Path(tempfile.mkdtemp(prefix="na-chaos-gray-"))
    os.environ[leaks.VARIABLE] = folder.name
    machine = leaks.Machine(folder.name, folder)
    failed = 0
    with running_registry(folder / "registry") as registry:
        registry.push(images.busybox())
        registry.push(images.bench_pull())
        for number, fault in enumerate(FAULTS):
            if not options.fault or any(name in fault.name for name in options.fault):
                failed += show(tried(fault, registry, folder / str(number), options))
    left = machine.left()
    print(*(f"left on the machine: {each}" for each in left), sep="\n")
    print(f"{failed} faults are not as they must be" if failed or left else "all as it must be")
    if not left:
        subprocess.run(["rm", "-rf", "--one-file-system", str(folder)], check=True)
    return 1 if failed or left else 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hold", type=float, default=60, help="seconds that a fault lasts")
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
