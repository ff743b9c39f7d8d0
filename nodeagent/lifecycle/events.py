"""Lifecycle events for any number of readers, without loss.

A reader has a bounded queue. One that does not keep up is cut off with `ResourceExhausted`, so that it lists anew:
an event is never skipped in silence.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

from nodeagent.errors import ResourceExhausted
from nodeagent.records import Container, Sandbox

MAX_UNREAD = 1000
MAX_READERS = 64

Kind = Literal["created", "started", "stopped", "deleted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """An event of the pod or container `object_id`, with its pod as it was right after (None: deleted)."""

    object_id: str
    kind: Kind
    at_ns: int
    sandbox: Sandbox | None
    containers: tuple[Container, ...]


class Events:
    """The bus: `publish` never waits, `subscribe` gives every event from now on."""

    def __init__(self) -> None:
        self._readers: dict[_Reader, None] = {}  # in the order in which they came

    def publish(
        self, kind: Kind, object_id: str, sandbox: Sandbox | None, containers: tuple[Container, ...]
    ) -> None:
        if not self._readers:
            return
        event = Event(
            object_id=object_id,
            kind=kind,
            at_ns=time.time_ns(),
            sandbox=sandbox,
            containers=containers,
        )
        for reader in tuple(self._readers):
            if not reader.offer(event):
                self._readers.pop(reader, None)

    @asynccontextmanager
    async def subscribe(self) -> AsyncIterator[AsyncIterator[Event]]:
        """Read all events from now on.

        Raises `ResourceExhausted`, here for one reader too many, and from the iterator when the reader fell behind.
        """
        if len(self._readers) >= MAX_READERS:
            raise ResourceExhausted(f"events: {MAX_READERS} clients read them, which is the limit")
        reader = _Reader()
        self._readers[reader] = None
        try:
            yield reader.events()
        finally:
            self._readers.pop(reader, None)


class _Reader:
    def __init__(self) -> None:
        self._queue: asyncio.Queue[Event | None] = asyncio.Queue()

    def offer(self, event: Event) -> bool:
        full = self._queue.qsize() >= MAX_UNREAD
        self._queue.put_nowait(None if full else event)
        return not full

    async def events(self) -> AsyncIterator[Event]:
        while (event := await self._queue.get()) is not None:
            yield event
        raise ResourceExhausted(f"events: more than {MAX_UNREAD} unread; list again")
