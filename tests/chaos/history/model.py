"""Decides whether a history is one that a CRI runtime may have.

What an answer says of an object was so at a moment between the begin and the end of its call. As states only go
forward, a history is right exactly if no answer that ended before another one began is of a later state. Objects are
independent: each is judged by itself. What these states are, `tests.chaos.history.objects` says.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tests.chaos.history.objects import (
    CREATED,
    CREATES,
    EXITED,
    GONE,
    HOLDER,
    RUNNING,
    Object,
    Objects,
    Seen,
    key_of,
)
from tests.chaos.history.record import Call, Ending, Event, Fault, Line, Sight

PATIENCE_SECONDS = 30.0
SECOND = 1_000_000_000
CROSSING = (
    SECOND  # for so long a client's cancellation and the agent's answer may cross on a busy machine
)

KINDS = {"created": CREATED, "started": RUNNING, "stopped": EXITED, "deleted": GONE}
FACTS = ("created_at", "started_at", "finished_at", "exit_code", "reason", "ip", "token")

# A fault, or a stop of the pod, explains the passing ones; nothing else does.
PASSING = ("UNAVAILABLE", "DEADLINE_EXCEEDED")
CLEAR = ("OK", "CANCELLED", "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION", *PASSING)

KILLED_CODE = 137
KILLED = {KILLED_CODE, 143}
UNKNOWN = 255
BROKEN_PIPE = 141
NEVER_STARTED = 128


@dataclass(frozen=True, slots=True)
class Violation:
    rule: str
    about: str
    text: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.about[:12]}: {self.text}"


class Model:
    """The verdict on one history. patience: how long a call may take that no fault holds up."""

    def __init__(self, lines: Iterable[Line], patience: float = PATIENCE_SECONDS) -> None:
        lines = list(lines)
        self._patience = int(patience * SECOND)
        self._calls = [line for line in lines if isinstance(line, Call)]
        self._calls.sort(key=lambda call: call.end)
        self._faults = [line for line in lines if isinstance(line, Fault)]
        self._loose = {container for fault in self._faults for container in fault.loose}
        self._endings = {line.token: line for line in lines if isinstance(line, Ending)}
        streams: dict[int, list[Event]] = defaultdict(list)
        for line in lines:
            if isinstance(line, Event):
                streams[line.stream].append(line)
        self._events = list(streams.values())
        self._objects = Objects(self._calls, self._events)

    def violations(self) -> list[Violation]:
        return list(self._all())

    def _all(self) -> Iterator[Violation]:
        for item in self._objects.values():
            yield from self._forward(item)
            yield from self._facts(item)
            yield from self._explained(item)
            yield from self._code(item)
            yield from self._heard(item)
        yield from self._alone()
        yield from self._joined()
        yield from self._streams()
        for call in self._calls:
            yield from self._answered(call)

    # --- one object ------------------------------------------------------------------------------------------------

    def _forward(self, item: Object) -> Iterator[Violation]:
        """States only go forward; what a stop has ended never runs again; what is gone stays away."""
        ended = sorted(item.seen, key=lambda seen: seen.end)
        highest: Seen | None = None
        place = 0
        for later in item.seen:  # by begin
            while ended[place].end < later.begin:
                if highest is None or ended[place].low > highest.low:
                    highest = ended[place]
                place += 1
            if highest is not None and highest.low > later.high:
                text = (
                    f"rank {highest.low} by {highest.by} until {highest.end}, then {later.high} by "
                    f"{later.by} from {later.begin}"
                )
                yield Violation("forward", item.id, text)
                return

    def _facts(self, item: Object) -> Iterator[Violation]:
        """Times, addresses, the exit code: once known they stay."""
        for name in FACTS:
            values = {getattr(sight, name) for _, sight in item.sights} - {None}
            if len(values) > 1:
                yield Violation("facts", item.id, f"{name} was each of {sorted(values)}")

    def _explained(self, item: Object) -> Iterator[Violation]:
        """No pod is stopped, and nothing goes, unless somebody had begun to stop or remove it."""
        gone = min((seen.end for seen in item.seen if seen.low == GONE), default=None)
        removals = ("RemovePodSandbox", "RemoveContainer")
        if item.told and gone is not None and not any(at < gone for at in item.asked(removals)):
            yield Violation("vanished", item.id, f"gone at {gone}, and nobody had removed it")
        stopped = min((seen.end for seen in item.seen if seen.low == EXITED), default=None)
        of_pod = item.told and not item.pod
        if of_pod and stopped is not None and not any(at < stopped for at in item.asked()):
            yield Violation("vanished", item.id, f"NOTREADY at {stopped}, and nobody stopped it")

    def _code(self, item: Object) -> Iterator[Violation]:
        """The exit code is what the program wrote, or that of a kill that somebody had asked for.

        Its last line is in its log. Both may be lost with launcher and supervisor.
        """
        ends = [sight for _, sight in item.sights if sight.exit_code is not None]
        if not ends or not item.token:
            return
        code, finished_at = ends[0].exit_code, ends[0].finished_at or 0
        ending = self._endings.get(item.token)
        wrote = ending.code if ending else None
        allowed = {wrote} - {None}
        if any(begin < finished_at for begin in item.asked()):
            allowed |= KILLED
        if item.token.startswith("bad-"):
            allowed |= {NEVER_STARTED}
        if item.id in self._loose:
            allowed |= KILLED | {UNKNOWN, BROKEN_PIPE}
        if code not in allowed:
            text = f"{code} {ends[0].reason}, but the program wrote {wrote}"
            yield Violation("code", item.id, text)
        elif ending and code == wrote and not ending.logged and item.id not in self._loose:
            yield Violation("log", item.id, f"the last line of {item.token} is not in its log")

    def _heard(self, item: Object) -> Iterator[Violation]:
        """The end of a program is known some time after it."""
        ending = self._endings.get(item.token or "")
        if ending is None or ending.code is None:
            return
        for seen, sight in item.sights:
            late = seen.begin - ending.at - self._troubled(ending.at, seen.begin)
            if sight.state == "CONTAINER_RUNNING" and late > self._patience:
                yield Violation("heard", item.id, f"RUNNING, {late / SECOND:.0f} s after its end")
                return

    # --- several objects -------------------------------------------------------------------------------------------

    def _alone(self) -> Iterator[Violation]:
        """Nobody has a name, an address or a host port while another one surely has it."""
        holders: dict[tuple[str, ...], dict[str, list[Seen]]] = defaultdict(dict)
        for item in self._objects.values():
            if item.identity:
                holders["name", *map(str, item.identity)][item.id] = item.existing
            for address in {sight.ip for _, sight in item.sights if sight.ip}:
                holders["address", address][item.id] = item.running
        for call in self._calls:
            if call.rpc == "RunPodSandbox" and call.told and (port := call.asked.get("port")):
                holders["host port", port][call.told] = self._objects[call.told].running
        for key, having in holders.items():
            for one, theirs in having.items():
                first = min((seen.end for seen in theirs), default=0)
                last = max((seen.begin for seen in theirs), default=0)
                for other, others in having.items():
                    both = any(first < seen.begin and seen.end < last for seen in others)
                    if one != other and both:
                        yield Violation("alone", one, f"{' '.join(key)}: {other} has it too")

    def _joined(self) -> Iterator[Violation]:
        """A retry of a creation that ended after its caller had gone gets its id, unless the agent died in between."""
        kills = sorted(fault.begin for fault in self._faults if "agent" in fault.kind)
        tried: dict[tuple[str, ...], list[Call]] = defaultdict(list)
        for call in self._calls:
            if call.rpc not in CREATES:
                continue
            before = [other.end for other in tried[key_of(call)]]
            tried[key_of(call)].append(call)
            held = HOLDER.search(call.text) if call.code == "ALREADY_EXISTS" else None
            if held is None or self._objects[held[1]].told:
                continue
            item = self._objects[held[1]]
            made = max((sight.created_at or 0 for _, sight in item.sights), default=0)
            place = bisect_left(kills, made)
            alive = place == len(kills) or kills[place] > call.end
            if alive and before and made > before[-1] + CROSSING:
                text = f"{' '.join(key_of(call))} is held, and nobody was told"
                yield Violation("joined", held[1], text)

    def _streams(self) -> Iterator[Violation]:
        """Each event is told once and in order, and none is left out before the last one of a stream."""
        transitions = list(self._transitions())
        for events in self._events:
            told: dict[str, list[str]] = defaultdict(list)
            for event in events:
                told[event.about].append(event.kind)
            for name, kinds in told.items():
                if kinds != sorted(set(kinds), key=lambda kind: KINDS[kind]):
                    yield Violation("events", name, f"came as {kinds}")
            times = [event.published for event in events]
            if times != sorted(times):
                yield Violation("events", events[0].about, "were not published in order")
            for name, kind, earliest, latest in transitions:
                if kind not in told[name] and times[0] < earliest and latest < times[-1]:
                    text = f"{kind} between {earliest} and {latest} is missing"
                    yield Violation("events", name, text)

    def _transitions(self) -> Iterator[tuple[str, str, int, int]]:
        """Those that surely took place, with the earliest and the latest moment at which each can have been."""
        for item in self._objects.values():
            for kind, rank in KINDS.items() if item.told else ():
                before = [seen.begin for seen in item.seen if seen.high < rank]
                after = min((seen.end for seen in item.seen if seen.low >= rank), default=None)
                if after is not None and (item.running or rank in (CREATED, GONE)):
                    yield item.id, kind, max(before, default=item.begun), after

    # --- answers ---------------------------------------------------------------------------------------------------

    def _answered(self, call: Call) -> Iterator[Violation]:
        """Each call ends, with success or a clear error, which is a passing one only if something explains it."""
        what = f"{call.rpc}: {call.code}: {call.text[:300]}"
        if call.code not in CLEAR:
            yield Violation("clear", call.about, what)
        lasted = call.end - call.begin - self._troubled(call.begin, call.end)
        if lasted > self._patience + call.seconds * SECOND:
            yield Violation("ends", call.about, f"{what} after {lasted / SECOND:.0f} s")
        if call.quiet and call.code != "OK":
            yield Violation("quiet", call.about, what)
        ran_out = call.rpc == "ExecSync" and call.seconds
        if call.code in PASSING and not ran_out and not self._excused(call):
            yield Violation("passing", call.about, what)
        if call.rpc.startswith("List") and not all(_matches(sight, call) for sight in call.seen):
            yield Violation("filter", call.about, f"{call.rpc} {call.asked}: {call.seen}")
        if call.rpc == "ExecSync" and call.code == "OK" and call.text != call.asked["output"]:
            ended = any(seen.low >= EXITED for seen in self._objects[call.about].seen)
            if not ended or not call.text.endswith(f" {KILLED_CODE}"):
                yield Violation("exec", call.about, f"{call.asked}, but it was {call.text!r}")

    def _excused(self, call: Call) -> bool:
        """Whether a fault was near, or its pod was being stopped."""
        if any(
            fault.begin <= call.end and call.begin <= fault.end + self._patience
            for fault in self._faults
        ):
            return True
        stops = self._objects[call.about].stops
        return any(stop.begin < call.end and call.begin < stop.end for stop in stops)

    def _troubled(self, begin: int, end: int) -> int:
        """How much of a time was in faults."""
        total, reached = 0, begin
        for fault in sorted(self._faults, key=lambda fault: fault.begin):
            start, stop = max(fault.begin, reached), min(fault.end, end)
            if stop > start:
                total, reached = total + stop - start, stop
        return total


def _matches(sight: Sight, call: Call) -> bool:
    return all(getattr(sight, name) == value for name, value in call.asked.items())
