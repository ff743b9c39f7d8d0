"""Whether something grows with the work that is done: the slope of a series, by Theil and Sen, and what it comes to.

The median of the slopes between all pairs of samples is not moved by the peaks and steps that a busy machine makes,
in up to 29 % of the samples. The first samples, until caches and pools are warm, are left out.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

WARM_UP = 0.3  # of the work
BOUND = 0.01
CLEAR = 0.05  # so much more while it was looked at is a growth, however little was done


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a series says.

    growth: in units of the series, for so much work as `per` says. share: the same as a share of its level.
    word: "flat" where it grows by no more than the bound, or by less than its samples differ from the line; "GROWS";
    "short" where it may, and a tenth of that work was not done, so that a warm-up cannot be told from a growth.
    """

    name: str
    level: float
    growth: float
    share: float
    word: str
    samples: int
    per: int

    @property
    def grows(self) -> bool:
        return self.word == "GROWS"

    def __str__(self) -> str:
        return (
            f"{self.name:44} {self.word:6} {self.level:10.1f} {self.growth:+10.3f} in {self.per:,} "
            f"({self.share:+.2%}), {self.samples} samples"
        )


def judge(
    name: str, work: Sequence[float], values: Sequence[float], *, per: int = 100_000
) -> Verdict:
    """Judge a series of `values`, each taken when so much `work` had been done."""
    first = work[0] + WARM_UP * (work[-1] - work[0])
    points = [(w, v) for w, v in zip(work, values, strict=True) if w >= first]
    if len(points) < 3:
        raise ValueError(f"{name}: {len(points)} samples after the warm-up, of {len(work)}")
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(points, 2) if b[0] > a[0]]
    slope = statistics.median(slopes)
    level = statistics.median(value for _, value in points)
    start = statistics.median(value - slope * at for at, value in points)
    off = statistics.median(abs(value - start - slope * at) for at, value in points)
    growth = slope * per
    share = growth / level if level else (0.0 if not growth else float("inf"))
    risen = slope * (points[-1][0] - points[0][0])
    if share <= BOUND or risen <= 2 * off:
        word = "flat"
    elif points[-1][0] - points[0][0] >= per / 10 or risen > CLEAR * level:
        word = "GROWS"
    else:
        word = "short"
    return Verdict(name, level, growth, share, word, len(points), per)
