"""The sweep: which rounds there are, in a random order of a seed, and the matrix of their outcomes."""

from __future__ import annotations

import random
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from tests.chaos.inject.calls import SETS
from tests.chaos.inject.rounds import FOREIGN, WORKERS, Player, Round, Verdict
from tests.chaos.inject.steps import AGENT, INIT, LAUNCHER, STEPS, SUPERVISOR
from tests.chaos.inject.strace import Fault, Place
from tests.chaos.inject.world import World
from tests.support.registry import Registry

_PAIRS = ((AGENT, SUPERVISOR), (LAUNCHER, SUPERVISOR), (AGENT, LAUNCHER))

_ID = re.compile(r"[0-9a-f]{64}|/tmp/na-chaos-\w+/world-\d+|/sys/fs/cgroup/[^/ ]+|(?<=nv)[0-9a-f]+")

Key = tuple[str, tuple[str, ...], str]


def combinations() -> list[Key]:
    """Step, process and set of calls, as far as they go together."""
    found: list[Key] = []
    for step in STEPS.values():
        for who in (*step.who, *((WORKERS,) if AGENT in step.who and not step.is_start else ())):
            names = ("init",) if who == INIT else tuple(SETS.keys() - {"init"})
            if who == WORKERS:
                names = tuple(SETS.keys() - {"init", "all"})
            found += [(step.name, (who,), name) for name in sorted(names)]
        pairs = [pair for pair in _PAIRS if set(pair) <= set(step.who)]
        found += [(step.name, pair, "all") for pair in pairs]
    return found


class Sweep:
    """Plays rounds, in a new world after each that went wrong. code: of its agent, as in `GatedAgent`."""

    def __init__(
        self,
        folder: Path,
        registry: Registry,
        say: Callable[[str], None] = print,
        code: Path | None = None,
    ) -> None:
        self._folder = folder
        self._registry = registry
        self._say = say
        self._code = code
        self.worlds = 0
        self.world: World | None = None
        self._player: Player | None = None
        self._places: dict[tuple[str, str, str], list[Place]] = {}
        self.verdicts: list[Verdict] = []

    def play(self, round_: Round) -> Verdict:
        if self._player is None:
            self.worlds += 1
            self.world = World(self._folder / f"world-{self.worlds}", self._code)
            self.world.open(self._registry)
            self._player = Player(self.world)
        verdict = self._player.play(round_)
        if verdict.problems and self.world is not None:
            log = self.world.agent.root / "run/launcher.log"
            said = log.read_text(errors="replace").splitlines() if log.exists() else []
            verdict.problems += [f"launcher.log: {line}" for line in said[-8:]]
            self.renew()
        if verdict.answer == FOREIGN:
            verdict.problems.clear()
        return verdict

    def renew(self) -> None:
        """End the world; the next round has another one."""
        if self.world is not None:
            with suppress(Exception):
                self.world.close()
        self.world = self._player = None

    def places(self, step: str, role: str, name: str) -> list[Place]:
        """The calls of a set that a process makes in a step."""
        key = (step, role, name)
        if key not in self._places:
            counting = Round(step=step, who=(role,), calls=(name,), fault=None, when=(1,))
            verdict = self.play(counting)
            if verdict.problems:
                raise RuntimeError(f"without any fault: {describe(verdict)}")
            self._places[key] = sorted(verdict.places)
        return self._places[key]

    def rounds(
        self, chooser: random.Random, *, only: Callable[[Key, Fault], bool], exhaustive: bool
    ) -> Iterator[Round]:
        """All rounds, in a random order.

        exhaustive: with one of each call that finds nothing left to hit, which proves that there were no more.
        """
        pending = [
            (key, fault)
            for key in combinations()
            for fault in map(Fault.parse, SETS[key[2]][1])
            if only(key, fault)
        ]
        numbers: dict[tuple[Key, Fault], list[Round]] = {}
        while pending:
            place = chooser.randrange(len(pending))
            key, fault = pending[place]
            if (key, fault) not in numbers:
                numbers[key, fault] = self._numbered(chooser, key, fault, beyond=int(exhaustive))
            left = numbers[key, fault]
            if left:
                yield left.pop()
            else:
                pending[place] = pending[-1]
                pending.pop()

    def _numbered(
        self, chooser: random.Random, key: Key, fault: Fault, *, beyond: int
    ) -> list[Round]:
        step, who, name = key
        places = [self.places(step, role, name) for role in who]
        if not all(places):
            return []
        if len(who) > 1:  # of two numbers, as many pairs as one of them has places
            hits = [tuple(map(chooser.choice, places)) for _ in range(max(map(len, places)))]
        elif fault.lasts:
            last = max(number for _, number in places[0])
            hits = [((name, number),) for number in range(1, last + beyond + 1)]
        else:  # and one beyond the last of each, which finds nothing to hit
            last_of = dict(places[0])
            further = [(call, last + 1) for call, last in last_of.items()] if beyond else []
            hits = [(place,) for place in (*places[0], *further)]
        chooser.shuffle(hits)
        return [
            Round(
                step=step,
                who=who,
                calls=tuple(call for call, _ in hit),
                fault=fault,
                when=tuple(number for _, number in hit),
            )
            for hit in hits
        ]

    def run(
        self, rounds: Iterable[Round], *, seconds: float = float("inf"), least: int = 0
    ) -> None:
        """Play them until the time is over, but at least some of them, however long they take."""
        end = time.monotonic() + seconds
        for number, round_ in enumerate(rounds):
            if number >= least and time.monotonic() > end:
                break
            self.note(self.play(round_))
        self.renew()

    def note(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)
        if verdict.problems:
            self._say(describe(verdict))

    @property
    def red(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if verdict.problems]

    def matrix(self) -> str:
        """Step × process × fault: how many rounds, what the answers were, how many were not as they must be."""
        table: dict[tuple[str, str, str, str], list[Verdict]] = defaultdict(list)
        for verdict in self.verdicts:
            tried = verdict.round
            table[tried.step, "+".join(tried.who), "+".join(tried.calls), str(tried.fault)].append(
                verdict
            )
        lines = [f"{'step':26} {'process':20} {'calls':12} {'fault':8} rounds  hit  red  answers"]
        for (step, who, calls, fault), verdicts in sorted(table.items()):
            answers = Counter(verdict.answer or "-" for verdict in verdicts)
            said = ", ".join(f"{answer} {count}" for answer, count in answers.most_common())
            hit = sum(bool(verdict.struck) for verdict in verdicts)
            red = sum(bool(verdict.problems) for verdict in verdicts)
            lines.append(
                f"{step:26} {who:20} {calls:12} {fault:8} {len(verdicts):6} {hit:4} {red or '.':>4}  {said}"
            )
        hits = sum(bool(verdict.struck) for verdict in self.verdicts)
        lines.append(
            f"{len(self.verdicts)} rounds, {hits} with a fault that struck, {len(self.red)} red"
        )
        return "\n".join(lines)


def describe(verdict: Verdict) -> str:
    lines = [f"RED after {verdict.seconds:.1f} s, answer {verdict.answer or '-'}:"]
    lines += [f"  python -m tests.chaos.inject {verdict.round}"]
    lines += [f"  hit: {call[:160]}" for call in verdict.struck[:3]]
    # Ids are of no interest, and twenty directories of one cgroup are one.
    kinds = Counter(_ID.sub("<id>", problem) for problem in verdict.problems)
    lines += [f"  {problem}" + f" × {n}" * (n > 1) for problem, n in kinds.most_common(12)]
    return "\n".join(lines)
