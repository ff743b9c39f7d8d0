"""What a reader of lifecycle events sees over the life of an agent: each event once, in order, as the records say."""

from dataclasses import dataclass

from nodeagent.lifecycle.events import Event
from nodeagent.lifecycle.node import Node
from nodeagent.records import Container, Sandbox
from tests.chaos.simulation.verdict import Violation

ORDER = ("", "created", "started", "stopped", "deleted")


@dataclass
class Seen:
    """The last event of an object, or what its record said when the reader began."""

    kind: str
    is_sandbox: bool


class Stream:
    """The events of one life. It begins with what there is then; no call and no event has come before."""

    def __init__(self, node: Node) -> None:
        self._seen: dict[str, Seen] = {}
        for sandbox in node.sandboxes.list():
            self._seen[sandbox.id] = Seen(_kind(sandbox), True)
        for container in node.containers.list():
            self._seen[container.id] = Seen(_kind(container), False)

    def hear(self, event: Event) -> None:
        is_sandbox = event.sandbox is not None and event.sandbox.id == event.object_id
        seen = self._seen.setdefault(event.object_id, Seen("", is_sandbox))
        before, kind, name = seen.kind, event.kind, event.object_id
        if ORDER.index(kind) <= ORDER.index(before):
            raise Violation(f"event {kind} of {name} comes after {before}")
        if kind != "created" and not before:
            raise Violation(f"event {kind} of {name} comes before created")
        if kind == "deleted" and before == "started":
            raise Violation(f"event deleted of {name} comes before stopped")
        self._compare(event)
        seen.kind = kind

    def _compare(self, event: Event) -> None:
        """An event carries its object as it was right after."""
        carried = [c for c in event.containers if c.id == event.object_id]
        if event.sandbox is not None and event.sandbox.id == event.object_id:
            if event.kind == "deleted" or (event.kind == "stopped") == event.sandbox.ready:
                raise Violation(f"event {event.kind} of {event.object_id}: {event.sandbox}")
        elif event.kind == "deleted" and carried:
            raise Violation(f"event deleted of {event.object_id} carries it")
        elif event.kind != "deleted" and [_kind(c) for c in carried] not in (
            [event.kind],
            [],
        ):
            raise Violation(f"event {event.kind} of {event.object_id}: {carried}")

    def compare(self, node: Node) -> None:
        """All that happened was told: the last event of each object is what its record says."""
        records: list[Sandbox | Container] = [*node.sandboxes.list(), *node.containers.list()]
        kinds = {record.id: _kind(record) for record in records}
        for name, seen in self._seen.items():
            if seen.kind != kinds.get(name, "deleted"):
                raise Violation(
                    f"{name} is {kinds.get(name, 'deleted')}, the last event {seen.kind}"
                )
        for name in kinds.keys() - self._seen.keys():
            raise Violation(f"{name} is {kinds[name]}, and there was no event")


def _kind(record: Sandbox | Container) -> str:
    if isinstance(record, Sandbox):
        return "started" if record.ready else "stopped"
    return {"created": "created", "running": "started", "exited": "stopped"}[record.state]
