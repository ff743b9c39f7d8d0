"""Readers of events."""

from __future__ import annotations

import threading
import time
from typing import Any

import grpc

from nodeagent.api import runtime_pb2 as pb
from nodeagent.api import runtime_pb2_grpc as rpc
from tests.chaos.history.client import CHANNEL, statuses
from tests.chaos.history.record import Event, History, Stream

READERS = 2
KINDS = {
    pb.CONTAINER_CREATED_EVENT: "created",
    pb.CONTAINER_STARTED_EVENT: "started",
    pb.CONTAINER_STOPPED_EVENT: "stopped",
    pb.CONTAINER_DELETED_EVENT: "deleted",
}


class Reader:
    """Reads one stream of events after the other, until it is closed."""

    def __init__(self, number: int, endpoint: str, history: History) -> None:
        self._number = number
        self._history = history
        self._channel = grpc.insecure_channel(endpoint, options=CHANNEL)
        self._over = False
        self._stream: Any = None
        self._deleted: set[str] = set()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        """Idempotent."""
        self._over = True
        if self._stream is not None:
            self._stream.cancel()
        self._channel.close()
        self._thread.join()

    def has_told_end_of(self, name: str) -> bool:
        return name in self._deleted

    def _run(self) -> None:
        runtime = rpc.RuntimeServiceStub(self._channel)
        stream = self._number
        while not self._over:
            begin = time.time_ns()
            try:
                self._stream = runtime.GetContainerEvents(
                    pb.GetEventsRequest(), wait_for_ready=True
                )
                for event in self._stream:
                    self._take(stream, event)
                code = "OK"
            except grpc.RpcError as error:
                code = error.code().name
            except ValueError:  # the channel is closed
                return
            end = time.time_ns()
            self._history.add(Stream(stream=stream, begin=begin, end=end, code=code))
            stream += READERS

    def _take(self, stream: int, event: pb.ContainerEventResponse) -> None:
        kind = KINDS[event.container_event_type]
        if kind == "deleted":
            self._deleted.add(event.container_id)
        pod = event.pod_sandbox_status
        self._history.add(
            Event(
                stream=stream,
                at=time.time_ns(),
                published=event.created_at,
                kind=kind,
                about=event.container_id,
                seen=statuses(pod, event.containers_statuses) if pod.id else (),
            )
        )
