"""docs/operations.md has every file that an agent makes, docs/metrics.md every metric that it tells."""

import os
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.support.cri import Cri
from tests.support.node import RunningAgent

PROJECT = Path(__file__).parents[2]
OPERATIONS = (PROJECT / "docs/operations.md").read_text()


def documented(title: str) -> list[str]:
    """The paths in the table below a title; a further name in a cell is beside the first one."""
    table = OPERATIONS.partition(f"### {title}")[2].partition("\n#")[0]
    paths = []
    for row in re.findall(r"(?m)^\| (`.*?) \|", table):
        first, *more = re.findall(r"`([^`]+)`", row)
        above = os.path.dirname(first.rstrip("/"))
        paths += [first, *(os.path.join(above, name) for name in more)]
    return paths


def unexplained(directory: Path, known: list[str]) -> Iterator[str]:
    """What is in a directory and in no row. A directory of which no row has a part is explained as a whole."""
    exact = [re.compile(pattern(path.rstrip("/"))) for path in known]
    above = [re.compile(pattern(part)) for path in known for part in parents(path.rstrip("/"))]
    for here, names, files in os.walk(directory):
        relative = os.path.relpath(here, directory).removeprefix(".").removeprefix("/")
        for name in [*names, *files]:
            path = os.path.join(relative, name)
            if any(parent.fullmatch(path) for parent in above):
                continue
            if not any(row.fullmatch(path) for row in exact):
                yield path
            if name in names:
                names.remove(name)


def pattern(path: str) -> str:
    return "".join(
        "[^/]+" if part.startswith("<") else re.escape(part)
        for part in re.split(r"(<[^>]+>)", path)
    )


def parents(path: str) -> Iterator[str]:
    while path := os.path.dirname(path):
        yield path


def test_every_file_of_a_node_is_explained(own_agent: RunningAgent, own_cri: Cri) -> None:
    container = own_cri.run()
    for title, name in (("Root directory", "lib"), ("State directory", "run")):
        known = documented(title)
        found = unexplained(own_agent.root / name, known)
        assert [path for path in found if not path.rpartition("/")[2].startswith(".")] == [], name
    container.pod.remove()


def test_every_metric_of_a_node_is_explained(cri: Cri) -> None:
    container = cri.run()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{cri.agent.metrics}/metrics", timeout=60) as page:
        told = set(re.findall(r"(?m)^# TYPE (\w+)", page.read().decode()))
    text = (PROJECT / "docs/metrics.md").read_text()
    explained = set(re.findall(r"(?m)^\| `(\w+)`", text))
    # Beside counters and histograms is the time of their creation.
    explained |= {f"{name.removesuffix('_total')}_created" for name in explained}
    assert told - explained == set()
    container.pod.remove()
