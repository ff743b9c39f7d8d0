"""Prints what each shortage does: step × shortage × outcome.

    python -m tests.chaos.scarce [SHORTAGE...]

Exits with 1 where something is not as it must be: an answer that does not say what is scarce, a container that was
touched, an exit code that was lost, something that does not work again without a restart, or something that is left.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.chaos.scarce import trial
from tests.chaos.scarce.shortages import SHORTAGES
from tests.support import images, leaks
from tests.support.registry import running_registry


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shortage", nargs="*", help="parts of the names of those to try")
    wanted = parser.parse_args().shortage
    folder = Path(tempfile.mkdtemp(prefix="na-chaos-scarce-"))
    os.environ[leaks.VARIABLE] = folder.name
    machine = leaks.Machine(folder.name, folder)
    failed = 0
    with running_registry(folder / "registry") as registry:
        registry.push(images.busybox())
        registry.push(images.pause())
        for number, shortage in enumerate(SHORTAGES):
            if not wanted or any(part in shortage.name for part in wanted):
                failed += show(trial.run(shortage, folder / str(number), registry))
    left = machine.left()
    print(*(f"left on the machine: {each}" for each in left), sep="\n")
    print(f"{failed} shortages are not as they must be" if failed or left else "all as it must be")
    if not left:
        subprocess.run(["rm", "-rf", "--one-file-system", str(folder)], check=True)
    return 1 if failed or left else 0


def show(report: trial.Report) -> bool:
    """Print a shortage; returns whether something is wrong."""
    wrong = report.complaints
    print(f"\n{report.shortage.name}: {'NOT as it must be' if wrong else 'as it must be'}")
    print(*(f"  {outcome.step:26} {outcome}" for outcome in report.outcomes), sep="\n")
    print(*(f"  ! {each}" for each in wrong), sep="\n", end="\n" if wrong else "", flush=True)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
