"""A reader of GetContainerEvents beside a step: each event comes once and in order, or the stream is closed."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import grpc

from nodeagent.api import runtime_pb2 as pb
from nodeagent.api import runtime_pb2_grpc as rpc
from tests.chaos.oracles import unclear
from tests.support.node import PATIENCE_SECONDS

CREATED, STARTED, STOPPED, DELETED = (
    pb.CONTAINER_CREATED_EVENT,
    pb.CONTAINER_STARTED_EVENT,
    pb.CONTAINER_STOPPED_EVENT,
    pb.CONTAINER_DELETED_EVENT,
)
_LIFE = (CREATED, STARTED, STOPPED, DELETED)  # of a container, and of a pod


class Watch:
    """One stream, read until the agent closes it, or `close`."""

    def __init__(self, runtime: rpc.RuntimeServiceStub) -> None:
        self._stream: Any = runtime.GetContainerEvents(pb.GetEventsRequest())
        self._told: list[pb.ContainerEventResponse] = []
        self._changed = threading.Condition()
        self._error: grpc.RpcError | None = None
        self._is_over = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        # The two calls take the same connection, so the events that are wanted come after the answer of the second.
        runtime.Version(pb.VersionRequest(), timeout=PATIENCE_SECONDS)

    def _read(self) -> None:
        try:
            for event in self._stream:
                with self._changed:
                    self._told.append(event)
                    self._changed.notify_all()
        except grpc.RpcError as error:
            self._error = error
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    @property
    def is_over(self) -> bool:
        """Whether the agent has closed it."""
        return self._is_over

    def close(self) -> None:
        """Idempotent."""
        self._stream.cancel()
        self._thread.join(PATIENCE_SECONDS)

    def problems(self, removed: Iterable[str]) -> list[str]:
        """What is wrong with what it has told, now that these pods and containers have been removed."""
        wanted = [name for name in removed if name]
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_over or all(map(self._has_told_end, wanted)), PATIENCE_SECONDS
            )
            told = list(self._told)
        found = _disorder(told)
        if not self._is_over:
            found += [f"no event tells that {n} is deleted" for n in wanted if not _ends(told, n)]
        elif self._error is None:
            found.append("the stream of events is closed without an error")
        elif reason := unclear(self._error):
            found.append(f"the stream of events is closed: {reason}")
        return found

    def _has_told_end(self, name: str) -> bool:
        return _ends(self._told, name)


def _ends(told: Iterable[pb.ContainerEventResponse], name: str) -> bool:
    return any(e.container_id == name and e.container_event_type == DELETED for e in told)


def _disorder(told: list[pb.ContainerEventResponse]) -> list[str]:
    """Events that come twice or in another order, or are left out between others."""
    kinds: dict[str, list[int]] = defaultdict(list)
    for event in told:
        kinds[event.container_id].append(event.container_event_type)
    never_ran = {
        status.id
        for event in told
        for status in event.containers_statuses
        if status.id == event.container_id and not status.started_at
    } - {e.container_id for e in told if e.container_event_type == STARTED}
    found = []
    for name, seen in kinds.items():
        whole = list(_LIFE[_LIFE.index(seen[0]) : _LIFE.index(seen[-1]) + 1])
        lives = [whole]
        if name in never_ran:  # one whose process ends before it is a program is EXITED as well
            lives = [
                [k for k in whole if k != STARTED],
                [k for k in whole if k in (CREATED, DELETED)],
            ]
        if seen not in lives:
            names = [pb.ContainerEventType.Name(kind) for kind in seen]
            found.append(f"the events of {name} came as {', '.join(names)}")
    times = [event.created_at for event in told]
    if times != sorted(times):
        found.append("events were not told in the order in which they happened")
    return found
