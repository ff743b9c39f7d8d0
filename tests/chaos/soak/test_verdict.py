"""What the soak says of series that were made up, and of a node that it aged for some seconds."""

import random
from pathlib import Path

import pytest

from tests.chaos.soak import load, plot
from tests.chaos.soak.__main__ import Series, loaded
from tests.chaos.soak.samples import Sampler
from tests.chaos.soak.verdict import judge
from tests.e2e.conftest import own_agent, own_cri
from tests.support.cri import Cri

__all__ = ["own_agent", "own_cri"]

WORK = [1000.0 * n for n in range(1, 26)]


def series(growth: float, noise: float, warm_up: float = 0.0) -> list[float]:
    """80,000 KiB that grow by a share per 100,000, with noise, after a warm-up."""
    dice = random.Random(7)
    return [
        80_000 * (1 + growth * work / 100_000)
        + dice.gauss(0, noise)
        - warm_up * max(0.0, 1 - work / 6000)
        for work in WORK
    ]


@pytest.mark.parametrize("noise", [0.0, 5.0, 100.0])
def test_what_is_flat(noise: float) -> None:
    assert judge("memory", WORK, series(0.0, noise)).word == "flat"
    assert judge("memory", WORK, series(0.0, noise, warm_up=20_000)).word == "flat"
    assert judge("memory", WORK, series(-0.1, noise)).word == "flat"


@pytest.mark.parametrize("noise", [0.0, 5.0, 100.0])
def test_what_grows(noise: float) -> None:
    verdict = judge("memory", WORK, series(0.05, noise))
    assert verdict.grows
    assert 0.04 < verdict.share < 0.06


def test_a_step_is_no_growth_and_one_descriptor_in_ten_thousand_is() -> None:
    peaks = [60.0 + (40.0 if number in (12, 20) else 0.0) for number in range(25)]
    assert judge("descriptors", WORK, peaks).word == "flat"
    leak = [60.0 + work // 10_000 for work in WORK]
    assert judge("descriptors", WORK, leak).grows


def test_little_work_shows_only_what_grows_much() -> None:
    little = [work / 100 for work in WORK]
    assert judge("memory", little, [80_000 + 2 * work for work in little]).word == "short"
    assert judge("descriptors", little, [60 + work // 10 for work in little]).grows


def test_too_few_samples_say_nothing() -> None:
    with pytest.raises(ValueError, match="after the warm-up"):
        judge("memory", WORK[:3], [1.0, 1.0, 1.0])


def test_the_plot_has_each_series() -> None:
    values = series(0.05, 5.0)
    found = {"a <name>": (WORK, values, judge("a", WORK, values))}
    text = plot.svg("title", found)
    assert "a &lt;name&gt;" in text
    assert text.count("<polyline") == 1
    assert 'stroke="red"' in text


def test_a_node_is_sampled(own_cri: Cri, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too short for a verdict on memory; what is counted must be the same after each pause."""
    monkeypatch.setattr("tests.chaos.soak.__main__.SAMPLES", 5)
    sampler = Sampler(own_cri.agent)
    steady = own_cri.run()
    phases: list[Series] = [
        loaded("commands", 100_000, load.commands(steady), sampler, 1),
        loaded("pods", 100_000, load.pods(own_cri), sampler, 4),
    ]
    for phase in phases:
        assert phase.failures == []
        assert phase.work[-1] > 4
        for name in ("mounts", "links", "directories of pods", "rows of lease"):
            values = {sample[name] for sample in phase.samples[1:] if name in sample}
            assert len(values) <= 1, (name, values)
        (tmp_path / "plot.svg").write_text(plot.svg(phase.phase, phase.verdicts()))
    steady.pod.remove()
