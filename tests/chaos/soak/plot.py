"""Series as an SVG: a small chart each, with its line of least growth."""

from collections.abc import Mapping, Sequence
from html import escape

from tests.chaos.soak.verdict import Verdict

WIDTH, HEIGHT, GAP, COLUMNS = 300, 120, 40, 3

Series = Mapping[str, tuple[Sequence[float], Sequence[float], Verdict]]


def svg(title: str, series: Series) -> str:
    """series: work, values and verdict by name."""
    rows = -(-len(series) // COLUMNS)
    size = f'width="{COLUMNS * (WIDTH + GAP)}" height="{rows * (HEIGHT + 2 * GAP) + GAP}"'
    charts = [
        _chart(name, *found, x=GAP // 2 + number % COLUMNS * (WIDTH + GAP),
               y=GAP + number // COLUMNS * (HEIGHT + 2 * GAP))
        for number, (name, found) in enumerate(series.items())
    ]  # fmt: skip
    head = f'<text x="{GAP // 2}" y="20" font-size="14">{escape(title)}</text>'
    style = 'font-family="sans-serif" font-size="10"'
    body = "\n".join([head, *charts])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n{body}\n</svg>\n'


def _chart(
    name: str, work: Sequence[float], values: Sequence[float], verdict: Verdict, *, x: int, y: int
) -> str:
    low, high = min(values), max(values)
    least = max(0.02 * abs(high), 1.0)  # so that noise does not fill the chart
    bottom, top = (low + high - least) / 2, (low + high + least) / 2
    bottom, top = min(bottom, low), max(top, high)
    span = max(work[-1] - work[0], 1)
    points = " ".join(
        f"{x + WIDTH * (at - work[0]) / span:.1f},{y + HEIGHT - HEIGHT * (value - bottom) / (top - bottom):.1f}"
        for at, value in zip(work, values, strict=True)
    )
    colour = {"flat": "green", "GROWS": "red"}.get(verdict.word, "gray")
    label = f"{name}: {low:g} to {high:g}, {verdict.share:+.2%} in {verdict.per:,}"
    return (
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#ccc"/>'
        f'<polyline points="{points}" fill="none" stroke="{colour}"/>'
        f'<text x="{x}" y="{y + HEIGHT + 14}" fill="{colour}">{escape(label)}</text>'
    )
