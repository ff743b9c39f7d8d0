"""The documents that are made from the code are what `make docs` would write, and have everything in them."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from deploy.documents import metrics, roff
from deploy.documents.pages import PAGES
from nodeagent.config_reference import sections
from nodeagent.metrics import collectors

PROJECT = Path(__file__).parents[2]
MANUALS = [name for name in PAGES if name.startswith("docs/man/")]


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_document_is_current(name: str) -> None:
    assert (PROJECT / name).read_text() == PAGES[name](), "run make docs, and commit what it writes"


@pytest.mark.parametrize("name", MANUALS)
@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_a_manual_page_is_formatted_without_a_warning(name: str) -> None:
    command = ["groff", "-man", "-ww", "-Tutf8", "-z", str(PROJECT / name)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("prose", "escaped"),
    [
        ("plain", "plain"),
        (".SH is no request\n'nor this", "\\&.SH is no request\n\\&'nor this"),
        ('a\\b --c "d"', "a\\eb \\-\\-c \\(dqd\\(dq"),
    ],
)
def test_nothing_in_a_text_is_a_request(prose: str, escaped: str) -> None:
    assert roff.text(prose) == escaped


def test_the_page_has_every_key_of_the_configuration() -> None:
    rows = re.findall(r"(?m)^\| `(\w+)` \|", PAGES["docs/config.md"]())
    names = [setting.name for section in sections() for setting in section.settings]
    assert rows == names


def test_a_metric_that_is_added_is_in_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    class Added(Collector):
        def __init__(self, node: object) -> None:
            self.node = node

        def collect(self) -> Iterator[GaugeMetricFamily]:
            yield GaugeMetricFamily("nodeagent_added", "What was added", labels=["kind"])

    monkeypatch.setattr(Added, "__module__", collectors.__name__)
    monkeypatch.setattr(collectors, "Added", Added, raising=False)
    row = "| `nodeagent_added` | gauge | `kind` | What was added |"
    assert row in metrics.page().splitlines()
