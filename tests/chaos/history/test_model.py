"""The model: a good history passes, and for each rule there is a bad one that it finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.chaos.history.model import SECOND, Model
from tests.chaos.history.record import Call, Ending, Event, Fault, History, Line, Sight, load

POD, OTHER, CONTAINER = "a" * 64, "b" * 64, "c" * 64
TOKEN = "exits-1-1"


def call(rpc: str, begin: float, end: float, code: str = "OK", **fields: Any) -> Call:
    times: dict[str, Any] = {"begin": int(begin * SECOND), "end": int(end * SECOND)}
    return Call(client=1, rpc=rpc, code=code, **times, **fields)


def pod(state: str = "SANDBOX_READY", name: str = POD, **fields: Any) -> Sight:
    told = {"owner": "u/n", "name": "p", "attempt": 0, "ip": "10.0.0.2", "created_at": SECOND}
    return Sight(id=name, kind="pod", state=state, **{**told, **fields})


def container(state: str = "CONTAINER_RUNNING", **fields: Any) -> Sight:
    told = {"owner": POD, "name": "c", "attempt": 0, "token": TOKEN, "pod": POD}
    return Sight(id=CONTAINER, kind="container", state=state, **{**told, **fields})


def ended(code: int = 7, **fields: Any) -> Sight:
    told = {"finished_at": 6 * SECOND, "exit_code": code, "reason": "Error"}
    return container("CONTAINER_EXITED", **{**told, **fields})


def ran(begin: float, told: str = POD, name: str = "p", **asked: str) -> Call:
    identity = {"owner": "u/n", "name": name, "attempt": "0"}
    return call("RunPodSandbox", begin, begin + 0.5, told=told, asked={**identity, **asked})


def status(begin: float, *seen: Sight) -> Call:
    return call("PodSandboxStatus", begin, begin + 0.1, about=POD, seen=seen)


def event(kind: str, at: float, about: str = CONTAINER, stream: int = 0) -> Event:
    return Event(
        stream=stream,
        at=int((at + 0.1) * SECOND),
        published=int(at * SECOND),
        kind=kind,
        about=about,
    )


CREATED = call(
    "CreateContainer",
    2,
    2.5,
    about=POD,
    told=CONTAINER,
    asked={"owner": POD, "name": "c", "attempt": "0"},
)
STARTED = call("StartContainer", 3, 3.5, about=CONTAINER)
STOPPED = call("StopContainer", 4, 4.5, about=CONTAINER)
REMOVED = call("RemoveContainer", 8, 8.5, about=CONTAINER)
REMOVED_POD = call("RemovePodSandbox", 9, 9.5, about=POD)
WROTE = Ending(token=TOKEN, code=7, at=5 * SECOND, logged=True)
GOOD: list[Line] = [
    event("created", 0.1, OTHER),
    ran(1),
    event("created", 1.2, POD),
    event("started", 1.2, POD),
    CREATED,
    event("created", 2.2),
    STARTED,
    event("started", 3.2),
    status(4, pod(), container()),
    call("ExecSync", 4, 4.2, about=CONTAINER, asked={"output": "1 0"}, text="1 0"),
    call("ListContainers", 4.1, 4.2, seen=(container(),), whole=True),
    event("stopped", 5),
    WROTE,
    status(7, pod(), ended()),
    REMOVED,
    event("deleted", 8.2),
    REMOVED_POD,
    event("stopped", 9.1, POD),
    event("deleted", 9.3, POD),
    call("ListContainers", 10, 10.1, whole=True),
    call("ListPodSandbox", 10, 10.1, whole=True),
    call("ContainerStatus", 11, 11.1, "NOT_FOUND", about=CONTAINER),
    event("created", 12, "e" * 64),
]


def but(*others: Line, without: Line | None = None, base: list[Line] | None = None) -> list[Line]:
    """The good history with other lines in addition, and without one of its own."""
    lines = GOOD if base is None else base
    assert without is None or without in lines
    return [*(line for line in lines if line != without), *others]


def first(*, code: int = 7, loose: bool = False, wrote: Line = WROTE, **fields: Any) -> list[Line]:
    """A container that has ended; `loose`: with launcher and supervisor both killed."""
    fault = Fault(kind="kill launcher, supervisor", begin=1, end=2, loose=(CONTAINER,))
    lines: list[Line] = [ran(1), CREATED, STARTED, wrote, status(7, pod(), ended(code, **fields))]
    return [*lines, fault] if loose else lines


KILLED_AGENT = Fault(kind="kill agent", begin=int(13.5 * SECOND), end=14 * SECOND)


def test_a_good_history() -> None:
    assert Model(GOOD).violations() == []


def created_late(*others: Line) -> list[Line]:
    """A creation that its caller gave up, and whose retry is told that the name is taken."""
    asked = {"owner": "u/n", "name": "late", "attempt": "0"}
    text = f'pod sandbox "late": attempt 0 is {OTHER}; remove it first, or use another attempt'
    return [
        call("RunPodSandbox", 12, 13, "CANCELLED", asked=asked),
        call("RunPodSandbox", 20, 21, "ALREADY_EXISTS", asked=asked, text=text),
        status(22, pod(name=OTHER, attempt=9, ip="10.0.0.9", created_at=15 * SECOND)),
        *others,
    ]


BAD: dict[str, tuple[str, list[Line]]] = {
    "runs after its end": ("forward", but(status(7.5, container()))),
    "runs after a stop": ("forward", [ran(1), CREATED, STARTED, STOPPED, status(5, container())]),
    "runs after a stop of its pod": (
        "forward",
        [
            ran(1),
            call("StopPodSandbox", 2, 3, about=POD),
            status(5, pod()),
        ],
    ),
    "an exec after a stop": (
        "forward",
        [
            ran(1),
            CREATED,
            STARTED,
            STOPPED,
            call("ExecSync", 5, 6, about=CONTAINER, asked={"output": ""}),
        ],
    ),
    "an exec that is refused before": (
        "forward",
        but(call("ExecSync", 3.6, 3.7, "FAILED_PRECONDITION", about=CONTAINER)),
    ),
    "starts twice": ("forward", but(call("StartContainer", 3.6, 3.7, about=CONTAINER))),
    "is listed after its removal": (
        "forward",
        but(call("ListContainers", 9, 9.1, seen=(ended(),))),
    ),
    "its pod's removal leaves it": (
        "forward",
        [ran(1), CREATED, REMOVED_POD, call("ListContainers", 10, 11, seen=(container(),))],
    ),
    "is missing in a list": ("forward", but(call("ListContainers", 3.6, 3.7, whole=True))),
    "is missing in the list of its pod": (
        "forward",
        but(call("ListContainers", 3.6, 3.7, about=POD, whole=True)),
    ),
    "a pod is missing in a list": ("forward", but(call("ListPodSandbox", 3.6, 3.7, whole=True))),
    "is not found though it is there": (
        "vanished",
        [ran(1), CREATED, call("ContainerStatus", 3, 3.1, "NOT_FOUND", about=CONTAINER)],
    ),
    "a pod stops by itself": ("vanished", [ran(1), status(3, pod("SANDBOX_NOTREADY"))]),
    "another code": ("facts", but(status(7.5, pod(), ended(8)))),
    "another end": ("facts", but(status(7.5, pod(), ended(finished_at=SECOND)))),
    "another address": ("facts", but(status(7.5, pod(ip="10.0.0.3"), ended()))),
    "a code that nobody wrote": ("code", first(code=8)),
    "a kill that nobody asked for": ("code", first(code=137)),
    "an unknown code": ("code", first(code=255)),
    "no code was written": (
        "code",
        first(code=7, wrote=Ending(token=TOKEN, code=None, at=0, logged=False)),
    ),
    "the last line is lost": ("log", first(wrote=msgspec.structs.replace(WROTE, logged=False))),
    "an end is not heard": ("heard", but(status(37, container()), without=REMOVED)),
    "a name twice": ("alone", but(status(2.6, pod(name=OTHER, ip="10.0.0.3")))),
    "an address twice": ("alone", but(status(2.6, pod(name=OTHER, attempt=2)))),
    "a host port twice": (
        "alone",
        [
            ran(1, port="80"),
            ran(2, told=OTHER, name="q", port="80"),
            status(4, pod()),
        ],
    ),
    "a host port that a stop has given back too early": (
        "alone",
        [
            ran(1, port="80"),
            call("StopPodSandbox", 1.6, 9, about=POD),
            ran(2, told=OTHER, name="q", port="80"),
            status(4, pod()),
        ],
    ),
    "a retry that does not join": ("joined", created_late()),
    "an event twice": ("events", but(event("deleted", 9.4, POD))),
    "events out of order": ("events", but(event("created", 11.5))),
    "events from the past": ("events", but(event("created", 3, "d" * 64))),
    "no event of a creation": ("events", but(without=event("created", 2.2))),
    "no event of a start": ("events", but(without=event("started", 3.2))),
    "no event of an end": ("events", but(without=event("stopped", 5))),
    "no event of a removal": ("events", but(without=event("deleted", 8.2))),
    "no event of a pod's stop": ("events", but(without=event("stopped", 9.1, POD))),
    "an unclear error": ("clear", but(call("Status", 1, 2, "INTERNAL"))),
    "a call that does not end": ("ends", but(call("Status", 1, 40))),
    "an error when all is quiet": (
        "quiet",
        but(call("RemovePodSandbox", 1, 2, "NOT_FOUND", about=OTHER, quiet=True)),
    ),
    "unavailable without a cause": (
        "passing",
        but(call("ContainerStatus", 3.6, 3.7, "UNAVAILABLE", about=CONTAINER)),
    ),
    "a filter is not obeyed": (
        "filter",
        but(
            call(
                "ListContainers",
                3.6,
                3.7,
                seen=(container(),),
                asked={"state": "CONTAINER_CREATED"},
            )
        ),
    ),
    "the output of another command": (
        "exec",
        but(call("ExecSync", 4, 4.2, about=CONTAINER, asked={"output": "1 0"}, text="2 0")),
    ),
}


@pytest.mark.parametrize(("rule", "lines"), BAD.values(), ids=BAD.keys())
def test_a_bad_history(rule: str, lines: list[Line]) -> None:
    assert rule in {violation.rule for violation in Model(lines).violations()}


FINE: dict[str, list[Line]] = {
    "lost with launcher and supervisor": first(code=255, loose=True),
    "killed as asked": [
        *first(code=137, finished_at=int(4.2 * SECOND)),
        call("StopContainer", 4, 4.5, about=CONTAINER),
    ],
    "a status while it stops": [
        ran(1),
        CREATED,
        STARTED,
        STOPPED,
        call("ContainerStatus", 4.4, 5, about=CONTAINER, seen=(container(),)),
    ],
    "stopped before it is started": [
        ran(1),
        CREATED,
        call("StopContainer", 2.6, 2.8, about=CONTAINER),
        STARTED,
    ],
    "not in a list that began before": but(call("ListContainers", 2.4, 2.6, whole=True)),
    "events end with the stream": but(
        *(line for line in GOOD if isinstance(line, Event) and line.published < 3 * SECOND),
        base=[line for line in GOOD if not isinstance(line, Event)],
    ),
    "a host port that passes to another pod": [
        ran(1, port="80"),
        call("StopPodSandbox", 1.8, 4, about=POD),
        ran(2, told=OTHER, name="q", port="80"),
        status(2.1, pod()),
        status(3, pod("SANDBOX_NOTREADY")),
    ],
    "a name again after a removal": but(
        ran(12, told=OTHER), call("RemovePodSandbox", 13, 14, about=OTHER)
    ),
    "unavailable after a fault": but(
        KILLED_AGENT, call("ContainerStatus", 14, 14.5, "UNAVAILABLE", about=OTHER)
    ),
    "the creation was cut off with the agent": created_late(
        msgspec.structs.replace(KILLED_AGENT, begin=16 * SECOND, end=17 * SECOND)
    ),
    "a call that a fault held up": but(
        Fault(kind="stop agent", begin=SECOND, end=35 * SECOND), call("Status", 1, 40)
    ),
    "an exec that a stop has killed": [
        ran(1),
        CREATED,
        STARTED,
        STOPPED,
        call("ExecSync", 4, 4.6, about=CONTAINER, asked={"output": "1 0"}, text=" 137"),
    ],
}


@pytest.mark.parametrize("lines", FINE.values(), ids=FINE.keys())
def test_what_looks_bad_and_is_not(lines: list[Line]) -> None:
    assert Model(lines).violations() == []


def test_a_history_is_read_as_it_was_written(tmp_path: Path) -> None:
    history = History()
    for line in GOOD:
        history.add(line)
    history.save(tmp_path / "history")
    assert load(tmp_path / "history") == GOOD
