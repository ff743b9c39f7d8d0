"""The oracle of events can fail: what no reader may see."""

from types import SimpleNamespace
from typing import Any

import pytest

from nodeagent.lifecycle.events import Event, Kind
from tests.chaos.simulation.stream import Stream
from tests.chaos.simulation.verdict import Violation
from tests.unit.cri import records

NOTHING: Any = SimpleNamespace(list=list)
NODE: Any = SimpleNamespace(sandboxes=NOTHING, containers=NOTHING)
CREATED = records.container("c")
RUNNING = records.container("c", started_at=1)


def event(kind: Kind, *containers: Any) -> Event:
    return Event(object_id="c", kind=kind, at_ns=0, sandbox=None, containers=containers)


@pytest.mark.parametrize(
    ("events", "why"),
    [
        ([event("started", RUNNING)], "before created"),
        ([event("created", CREATED)] * 2, "created of c comes after created"),
        ([event("created", CREATED), event("started", CREATED)], "event started of c: "),
        (
            [event("created", CREATED), event("started", RUNNING), event("deleted")],
            "before stopped",
        ),
        ([event("created", CREATED), event("deleted", CREATED)], "carries it"),
    ],
)
def test_a_stream_that_is_wrong(events: list[Event], why: str) -> None:
    stream = Stream(NODE)
    for each in events[:-1]:
        stream.hear(each)
    with pytest.raises(Violation, match=why):
        stream.hear(events[-1])


def test_an_event_that_is_missing() -> None:
    stream = Stream(NODE)
    stream.hear(event("created", CREATED))
    stream.hear(event("started", RUNNING))
    with pytest.raises(Violation, match="c is deleted, the last event started"):
        stream.compare(NODE)
    node: Any = SimpleNamespace(
        sandboxes=NOTHING, containers=SimpleNamespace(list=lambda: [CREATED])
    )
    with pytest.raises(Violation, match="c is created, the last event started"):
        stream.compare(node)
