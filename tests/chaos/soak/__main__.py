"""Ages a node, and says whether anything grows with what it does.

    python -m tests.chaos.soak [--minutes N] [--plot FILE]

Four phases: commands in one container, pods that come and go, restarts of the agent, and its replacement by an earlier
release and back, with a pod that runs. Exits with 1 where a series grows, or anything failed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.soak import load, plot
from tests.chaos.soak.samples import Sampler
from tests.chaos.soak.verdict import Verdict, judge
from tests.e2e.conftest import client
from tests.support import images, leaks
from tests.support.cri import Container, Cri
from tests.support.registry import running_registry
from tests.upgrade import releases
from tests.upgrade.conftest import Replaced, replaced_agent

SAMPLES = 24


@dataclass(slots=True)
class Series:
    """The samples of a phase. per: of its work, for the verdict."""

    phase: str
    per: int
    work: list[float] = field(default_factory=list)
    samples: list[dict[str, float]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, work: int, sample: dict[str, float]) -> None:
        self.work.append(work)
        self.samples.append(sample)

    def verdicts(self) -> dict[str, tuple[list[float], list[float], Verdict]]:
        """By name; what not every sample has is left out."""
        names = [name for name in self.samples[0] if all(name in each for each in self.samples)]
        found = {}
        for name in names:
            values = [each[name] for each in self.samples]
            label = f"{self.phase}: {name}"
            found[label] = self.work, values, judge(label, self.work, values, per=self.per)
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--plot", type=Path, default=None, help="an SVG file to write")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="na-chaos-soak-"))
    os.environ[leaks.VARIABLE] = folder.name
    machine = leaks.Machine(folder.name, folder)
    phases = list(aged(folder, options.minutes * 60))
    left = machine.left()
    verdicts = {name: found for phase in phases for name, found in phase.verdicts().items()}
    if options.plot:
        options.plot.write_text(plot.svg(f"{options.minutes:g} minutes of soak", verdicts))
    for _, _, verdict in verdicts.values():
        print(verdict)
    for phase in phases:
        print(f"{phase.phase}: {phase.work[-1]:.0f} done, {len(phase.failures)} failed")
        print(*(f"  ! {text}" for text in phase.failures[:5]), sep="\n", end="")
    print(*(f"left on the machine: {each}" for each in left), sep="\n")
    grown = [name for name, (_, _, verdict) in verdicts.items() if verdict.grows]
    failed = grown or left or any(phase.failures for phase in phases)
    words = Counter(verdict.word for _, _, verdict in verdicts.values())
    print(", ".join(f"{words[word]} series: {word}" for word in ("flat", "short", "GROWS")))
    if not left:
        subprocess.run(["rm", "-rf", "--one-file-system", str(folder)], check=True)
    return 1 if failed else 0


def aged(folder: Path, seconds: float) -> Iterator[Series]:
    with running_registry(folder / "registry") as registry:
        registry.push(images.busybox())
        with replaced_agent(folder, registry) as replaced:
            replaced.be(None)
            cri = client(replaced.agent, registry)
            steady = cri.run("sh", "-c", "while :; do echo line; sleep 0.1; done")
            sampler = Sampler(replaced.agent)
            commands, pods = load.commands(steady), load.pods(cri)
            yield loaded("commands", 100_000, commands, sampler, 0.3 * seconds)
            yield loaded("pods", 100_000, pods, sampler, 0.4 * seconds)
            yield restarted(cri, steady, sampler, 0.2 * seconds)
            yield replaced_often(replaced, cri, steady, sampler, 0.1 * seconds)
            steady.pod.remove()
            if replaced.agent.stop() != 0:
                raise RuntimeError(replaced.agent.log.read_text()[-4000:])


def loaded(phase: str, per: int, work: load.Load, sampler: Sampler, seconds: float) -> Series:
    """The load pauses for each sample."""
    series = Series(phase, per)
    for number in range(SAMPLES + 1):
        with work.going_on():
            time.sleep(seconds / (SAMPLES + 1))
        series.add(work.count, sampler.calm())
        said(series, number)
    series.failures = work.failures
    return series


def restarted(cri: Cri, steady: Container, sampler: Sampler, seconds: float) -> Series:
    """By SIGKILL and by SIGTERM, in turns."""
    count = 0

    def once() -> None:
        nonlocal count
        count += 1
        if count % 2:
            cri.agent.kill()
        else:
            cri.agent.stop()
        cri.agent.start()
        load.alone(cri, steady)

    return repeated("restarts", 1000, once, sampler, seconds)


def replaced_often(
    replaced: Replaced, cri: Cri, steady: Container, sampler: Sampler, seconds: float
) -> Series:
    """By the newest of the earlier releases, and by this one again."""
    earlier = releases.earlier()[0]

    def once() -> None:
        replaced.agent.stop()  # an earlier release knows of no journal
        replaced.be_earlier(earlier)
        load.alone(cri, steady)
        replaced.agent.kill()
        replaced.be_present()
        load.alone(cri, steady)

    return repeated("upgrades and back", 100, once, sampler, seconds)


def repeated(
    phase: str, per: int, once: Callable[[], None], sampler: Sampler, seconds: float
) -> Series:
    series = Series(phase, per)
    deadline = time.monotonic() + seconds
    count = 0
    while time.monotonic() < deadline or len(series.samples) < 6:
        with noted(series):
            once()
        count += 1
        # Seldom enough to restart often, and at least six times.
        if count % max(1, int(count / SAMPLES)) == 0 or len(series.samples) < 6:
            series.add(count, sampler.calm())
            said(series, len(series.samples))
    return series


@contextmanager
def noted(series: Series) -> Iterator[None]:
    try:
        yield
    except AssertionError as error:
        series.failures.append(repr(error))


def said(series: Series, number: int) -> None:
    if number % 6 == 0:
        print(f"{series.phase}: {series.work[-1]:.0f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
