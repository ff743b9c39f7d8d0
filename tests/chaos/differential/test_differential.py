"""An agent and containerd give the same answers, but for the rows of docs/differences.md."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.containerd import PROGRAMS
from tests.chaos import seeds
from tests.chaos.differential.caller import Answer, Caller
from tests.chaos.differential.cases import CASES
from tests.chaos.differential.compare import (
    DOCUMENT,
    differences,
    documented,
    pair,
    run,
)
from tests.chaos.differential.walk import every_state, walk
from tests.support.registry import Registry
from tests.support.scratch import scratch

NEEDED = ("containerd", "containerd-shim-runc-v2", "runc", "bridge")
KNOWN = documented(DOCUMENT.read_text())


@pytest.fixture(scope="module")
def callers(registry: Registry) -> Iterator[tuple[Caller, Caller]]:
    missing = [name for name in NEEDED if not (PROGRAMS / name).exists()]
    if missing:
        pytest.skip(f"{', '.join(missing)}: `make peer` builds them with Go 1.26 or newer")
    with (
        scratch("na-test-differential-", "/tmp") as root,
        pair(root, registry) as both,
    ):
        yield both


# However slow the machine is: it makes so many calls.
@pytest.mark.timeout(1800)
def test_the_table_has_all_differences(
    callers: tuple[Caller, Caller], capsys: pytest.CaptureFixture[str]
) -> None:
    """A walk of a random seed meets no other ones than the cases do."""
    seed = seeds.of_this_run()
    with capsys.disabled():
        print(f"\ndifferential: seed {seed}")
    found = run([*CASES, every_state, walk(seed)], callers)
    assert sorted(map(str, found - KNOWN)) == [], f"seed {seed}"
    assert sorted(map(str, KNOWN - found)) == []


def test_each_row_has_a_reason_and_is_read() -> None:
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    assert len(rows) == len(KNOWN)
    assert all(line.split(" | ")[3].strip(" |") for line in rows)


def answer(code: str = "OK", label: str = "Status of it", **fields: str) -> Answer:
    return Answer(label=label, code=code, fields=fields)


@pytest.mark.parametrize(
    ("ours", "theirs", "rows"),
    [
        (answer(), answer(), []),
        (answer("NOT_FOUND"), answer("UNKNOWN"), ["| `Status` of it | NOT_FOUND | UNKNOWN |"]),
        (answer(a="1"), answer(a="2"), ["| `Status` of it: `a` | 1 | 2 |"]),
        (answer(a="1"), answer(), ["| `Status` of it: `a` | 1 | – |"]),
        (
            answer(**{"a.b.c": "1", "a.b.d": "1", "a.x": "1"}),
            answer(**{"a.x": "1"}),
            ["| `Status` of it: `a.b` | a message | – |"],
        ),
        (
            answer(**{"items": "2 of them", "items[0].id": "ID"}),
            answer(items="none"),
            ["| `Status` of it: `items` | 2 of them | none |"],
        ),
    ],
)
def test_what_differs_is_found(ours: Answer, theirs: Answer, rows: list[str]) -> None:
    assert [str(row) for row in differences([(ours, theirs)])] == rows


def test_what_is_so_in_several_answers_is_one_row() -> None:
    labels = ("Status of it", "Status of that")
    pairs = [(answer(label=each, a="1"), answer(label=each, a="2")) for each in labels]
    assert [str(row) for row in differences(pairs)] == ["| `Status`: `a` | 1 | 2 |"]
