"""What a run has recorded: all calls, events and faults, one a line of a file. The model looks at nothing else.

Times are ns since the epoch, as the agent has them in its answers, so that both can be compared.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec


class Sight(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An object as an answer or event shows it; `state` is a name of the CRI. What it does not tell is None."""

    id: str
    kind: Literal["pod", "container"]
    state: str
    owner: str  # uid and namespace of a pod, the pod's id of a container
    name: str
    attempt: int
    token: str | None = None  # a label: which request it was made by
    pod: str = ""
    ip: str | None = None
    created_at: int | None = None
    started_at: int | None = None
    finished_at: int | None = None
    exit_code: int | None = None
    reason: str | None = None


class Call(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="call"):
    """A call. about: the id in the request; asked: what else the model needs of it; told: the id in the answer.

    whole: `seen` is everything that there is of this kind, or that belongs to the pod `about`.
    """

    client: int
    rpc: str
    begin: int
    end: int
    code: str
    about: str = ""
    asked: dict[str, str] = {}
    told: str = ""
    seen: tuple[Sight, ...] = ()
    whole: bool = False
    seconds: float = 0.0  # that the request itself may last
    text: str = ""
    quiet: bool = False  # nobody else calls, no fault is left


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="event"):
    """An event, as it came to the reader. kind: "created", "started", "stopped" or "deleted"."""

    stream: int
    at: int
    published: int
    kind: str
    about: str
    seen: tuple[Sight, ...] = ()


class Stream(msgspec.Struct, frozen=True, kw_only=True, tag="stream"):
    """A stream of events from its opening to its end."""

    stream: int
    begin: int
    end: int
    code: str


class Fault(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="fault"):
    """A fault, until what was hit works again. loose: containers whose pipes and pids nobody held in between.

    lacking: what did not work for so long that it was no longer waited for.
    """

    kind: str
    begin: int
    end: int
    loose: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()


class Ending(msgspec.Struct, frozen=True, kw_only=True, tag="ending"):
    """What a program has written before its end: its exit code, and whether its last line is in its log."""

    token: str
    code: int | None
    at: int
    logged: bool


Line: TypeAlias = Call | Event | Stream | Fault | Ending


class History:
    """The record of a run, which several threads add to."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.calls = 0
        self._lock = threading.Lock()

    def add(self, line: Line) -> None:
        with self._lock:
            self.lines.append(line)
            self.calls += isinstance(line, Call)

    def save(self, path: Path) -> None:
        path.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in self.lines))


def load(path: Path) -> list[Line]:
    return [msgspec.json.decode(line, type=Line) for line in path.read_bytes().splitlines()]
