"""What a history says of each pod and container: which states it may have had, and when.

Both go through states in one direction:

    container   CREATED ─► RUNNING ─► EXITED ─► gone         rank 1, 2, 3, 4
    pod                    READY ─► NOTREADY ─► gone         rank 2, 3, 4
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from tests.chaos.history.record import Call, Event, Sight

CREATED, RUNNING, EXITED, GONE = range(1, 5)
RANKS = {
    "SANDBOX_READY": RUNNING,
    "SANDBOX_NOTREADY": EXITED,
    "CONTAINER_CREATED": CREATED,
    "CONTAINER_RUNNING": RUNNING,
    "CONTAINER_EXITED": EXITED,
}

CREATES = ("RunPodSandbox", "CreateContainer")
STOPS = ("StopContainer", "StopPodSandbox", "RemoveContainer", "RemovePodSandbox")
IN_CONTAINER = ("ExecSync", "ReopenContainerLog")

# The lowest and the highest state that an answer speaks of, besides what it shows.
SAYS = {
    ("RunPodSandbox", "OK"): ((RUNNING, RUNNING),),
    ("CreateContainer", "OK"): ((CREATED, CREATED),),
    ("StartContainer", "OK"): ((CREATED, CREATED), (RUNNING, RUNNING)),
    ("ExecSync", "OK"): ((RUNNING, RUNNING),),
    ("ReopenContainerLog", "OK"): ((RUNNING, RUNNING),),
    ("ContainerStats", "OK"): ((CREATED, EXITED),),
    ("UpdateContainerResources", "OK"): ((CREATED, EXITED),),
    ("ContainerStats", "NOT_FOUND"): ((EXITED, GONE),),  # there is nothing to measure any more
    ("StopPodSandbox", "OK"): ((EXITED, GONE),),
    ("RemovePodSandbox", "OK"): ((GONE, GONE),),
    ("RemoveContainer", "OK"): ((GONE, GONE),),
}
HOLDER = re.compile(r" is ([0-9a-f]{64}); remove it first")


@dataclass(frozen=True, slots=True)
class Seen:
    """A state of at least `low` and at most `high`, at a moment between `begin` and `end`."""

    begin: int
    end: int
    low: int
    high: int
    by: str


@dataclass(slots=True)
class Object:
    """A pod or container. stops: those of it and of its pod; refused: what needs a container that runs.

    told: when a caller first had the id as an answer; begun: when that was first asked for.
    """

    id: str
    pod: str = ""
    identity: tuple[str, str, int] | None = None
    token: str | None = None
    seen: list[Seen] = field(default_factory=list)
    sights: list[tuple[Seen, Sight]] = field(default_factory=list)
    stops: list[Call] = field(default_factory=list)
    refused: list[Call] = field(default_factory=list)
    told: int = 0
    begun: int = 0

    def asked(self, rpcs: Sequence[str] = STOPS) -> Iterator[int]:
        """When its stops or removals began."""
        return (call.begin for call in self.stops if call.rpc in rpcs)

    @property
    def existing(self) -> list[Seen]:
        return [seen for seen in self.seen if seen.low >= CREATED and seen.high <= EXITED]

    @property
    def running(self) -> list[Seen]:
        return [seen for seen in self.seen if seen.low == seen.high == RUNNING]

    def note(self, call: Call, low: int, high: int, by: str = "") -> None:
        by = by or f"{call.rpc} {call.code}"
        self.seen.append(Seen(call.begin, call.end, low, high, by))

    def conclude_stops(self) -> None:
        """What ran before a stop that returned, or before an exec that was refused, has ended then."""
        ran = min((seen.end for seen in self.seen if seen.low >= RUNNING), default=None)
        stops = [c for c in self.stops if c.code == "OK" and c.rpc.startswith("Stop")]
        for call in (*stops, *self.refused):
            if ran is not None and ran < call.begin:
                self.note(call, EXITED, GONE)


class Objects(dict[str, Object]):
    """All pods and containers, by id. calls: in the order of their end; events: by stream, as they came."""

    def __init__(self, calls: Sequence[Call], events: Iterable[Sequence[Event]]) -> None:
        super().__init__()
        self._members: dict[str, list[Object]] = defaultdict(list)
        for call in calls:
            self._take(call)
        for stream in events:
            for event in stream:
                for sight in event.seen:
                    self._show(sight, stream[0].published, event.at, f"event {event.kind}")
        self._note_creations(calls)
        for item in list(self.values()):
            if item.pod:
                self._members[item.pod].append(item)
                item.stops += self[item.pod].stops if item.pod in self else ()
        for call in calls:
            self._conclude(call)
        for item in self.values():
            item.conclude_stops()
            item.seen.sort(key=lambda seen: seen.begin)

    def __missing__(self, name: str) -> Object:
        return self.setdefault(name, Object(name))

    def _take(self, call: Call) -> None:
        for sight in call.seen:
            self._show(sight, call.begin, call.end, call.rpc)
        if call.rpc in STOPS:
            self[call.about].stops.append(call)
        # Its supervisor has seen the end, of which it may tell later, when the log is complete.
        known = call.code == "FAILED_PRECONDITION" and "just ended" not in call.text
        if call.rpc in IN_CONTAINER and known:
            self[call.about].refused.append(call)

    def _show(self, sight: Sight, begin: int, end: int, by: str) -> None:
        item = self[sight.id]
        item.pod = item.pod or sight.pod
        item.token = item.token or sight.token
        if sight.owner:  # a container's status does not tell its pod
            item.identity = (sight.owner, sight.name, sight.attempt)
        seen = Seen(begin, end, RANKS[sight.state], RANKS[sight.state], by)
        item.seen.append(seen)
        item.sights.append((seen, sight))

    def _note_creations(self, calls: Iterable[Call]) -> None:
        begun: dict[tuple[str, ...], int] = {}
        for call in sorted(calls, key=lambda call: call.begin):
            if call.rpc in CREATES:
                begun.setdefault(key_of(call), call.begin)
        for call in calls:
            if call.rpc in CREATES and call.told:
                item = self[call.told]
                item.told, item.begun = item.told or call.end, begun[key_of(call)]
                item.pod = item.pod or call.about

    def _conclude(self, call: Call) -> None:
        for low, high in SAYS.get((call.rpc, call.code), ()):
            self[call.told or call.about].note(call, low, high)
        if (call.rpc, call.code) == ("RemovePodSandbox", "OK"):
            for container in self._members[call.about]:
                if container.told and container.told < call.begin:
                    container.note(call, GONE, GONE)
        elif call.code == "NOT_FOUND" and call.about and call.rpc != "ContainerStats":
            self[call.about].note(call, GONE, GONE)
        elif call.code == "ALREADY_EXISTS" and (held := HOLDER.search(call.text)):
            self[held[1]].note(call, CREATED, EXITED)
        elif call.whole and call.code == "OK":
            self._conclude_absences(call)

    def _conclude_absences(self, call: Call) -> None:
        """A list without an object that a caller had been told of before: it is gone."""
        shown = {sight.id for sight in call.seen}
        of_pods = call.rpc == "ListPodSandbox"
        for item in self._members[call.about] if call.about else list(self.values()):
            if item.id not in shown and 0 < item.told < call.begin and of_pods != bool(item.pod):
                item.note(call, GONE, GONE, f"{call.rpc} without it")


def key_of(call: Call) -> tuple[str, ...]:
    """What a creation is joined by."""
    return tuple(call.asked[name] for name in ("owner", "name", "attempt"))
