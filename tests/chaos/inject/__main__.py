"""Sweep over faults of the kernel, and kills and stops, at every call that our processes make.

    python -m tests.chaos.inject [--fraction 0.1] [--seed 7] [--seconds 3600] [--step 'PATTERN'] …

With --when one round is played, as it is printed of one that went wrong.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import random
import signal
import sys

from tests.chaos.inject.rounds import STOP_SECONDS, Round
from tests.chaos.inject.strace import Fault, unavailable
from tests.chaos.inject.sweep import Key, Sweep, describe
from tests.chaos.inject.world import stock
from tests.support import leaks
from tests.support.registry import running_registry
from tests.support.scratch import scratch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--fraction", type=float, default=1.0, help="of the rounds, by chance")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--step", default="*", help="a pattern")
    parser.add_argument("--who", default="*", help="a pattern, or processes joined by +")
    parser.add_argument("--calls", default="*", help="a set, or calls")
    parser.add_argument("--fault", default="*", help="an errno, with + for two seconds; KILL; STOP")
    parser.add_argument("--when", help="play this one round")
    parser.add_argument("--stop-seconds", type=float, default=STOP_SECONDS)
    options = parser.parse_args()
    if reason := unavailable():
        print(reason, file=sys.stderr)
        return 2
    signal.signal(
        signal.SIGTERM, lambda _number, _frame: sys.exit(143)
    )  # so that all is taken down
    os.environ[leaks.VARIABLE] = f"na-chaos-{os.getpid()}"
    with scratch("na-chaos-") as folder:
        folder.chmod(0o755)
        with running_registry(folder / "registry") as registry:
            stock(registry)
            sweep = Sweep(folder, registry, lambda text: print(text, flush=True))
            try:
                return _play_one(sweep, options) if options.when else _sweep(sweep, options)
            finally:
                sweep.renew()


def _play_one(sweep: Sweep, options: argparse.Namespace) -> int:
    verdict = sweep.play(
        Round(
            step=options.step,
            who=tuple(options.who.split("+")),
            calls=tuple(options.calls.split("+")),
            fault=Fault.parse(options.fault),
            when=tuple(map(int, options.when.split("+"))),
            stop_seconds=options.stop_seconds,
        )
    )
    print(
        describe(verdict) if verdict.problems else f"green: {verdict.answer}, hit {verdict.struck}"
    )
    return 1 if verdict.problems else 0


def _sweep(sweep: Sweep, options: argparse.Namespace) -> int:
    chooser = random.Random(options.seed)
    print(f"seed {options.seed}", flush=True)

    def only(key: Key, fault: Fault) -> bool:
        step, who, calls = key
        pairs = ((step, options.step), ("+".join(who), options.who), (calls, options.calls))
        return all(fnmatch.fnmatch(*pair) for pair in (*pairs, (str(fault), options.fault)))

    everything = sweep.rounds(chooser, only=only, exhaustive=options.fraction == 1)
    rounds = (round_ for round_ in everything if chooser.random() < options.fraction)
    try:
        sweep.run(rounds, seconds=options.seconds)
    finally:
        print(sweep.matrix(), flush=True)
    return 1 if sweep.red else 0


if __name__ == "__main__":
    sys.exit(main())
