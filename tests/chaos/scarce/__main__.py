"""Prints what each shortage does: step × shortage × outcome.

    python -m tests.chaos.scarce [SHORTAGE...]

Exits with 1 where something is not as it must be: an answer that does not say what is scarce, a container that was
touched, an exit code that was lost, something that does not work again without a restart, or something that is left.
"""

import argparse
import sys
from pathlib import Path

from tests.chaos import command
from tests.chaos.scarce import trial
from tests.chaos.scarce.shortages import SHORTAGES, Shortage
from tests.support import images
from tests.support.registry import Registry


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shortage", nargs="*", help="parts of the names of those to try")
    wanted = parser.parse_args().shortage

    def is_wrong(shortage: Shortage, folder: Path, registry: Registry) -> bool:
        return show(trial.run(shortage, folder, registry))

    pushed = (images.busybox(), images.pause())
    return command.play("shortages", SHORTAGES, wanted, pushed, is_wrong)


def show(report: trial.Report) -> bool:
    """Print a shortage; returns whether something is wrong."""
    wrong = report.complaints
    print(f"\n{report.shortage.name}: {'NOT as it must be' if wrong else 'as it must be'}")
    print(*(f"  {outcome.step:26} {outcome}" for outcome in report.outcomes), sep="\n")
    print(*(f"  ! {each}" for each in wrong), sep="\n", end="\n" if wrong else "", flush=True)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
