"""Events without loss: a slow reader is cut off, never skipped."""

from contextlib import AsyncExitStack

import pytest

from nodeagent.errors import ResourceExhausted
from nodeagent.lifecycle.events import MAX_READERS, MAX_UNREAD, Events


async def test_every_reader_gets_every_event() -> None:
    events = Events()
    async with events.subscribe() as one, events.subscribe() as other:
        events.publish("created", "a", None, ())
        events.publish("deleted", "a", None, ())
        for reader in (one, other):
            assert [(await anext(reader)).kind, (await anext(reader)).kind] == [
                "created",
                "deleted",
            ]


async def test_a_slow_reader_is_cut_off_after_what_it_has() -> None:
    events = Events()
    async with events.subscribe() as reader:
        for _ in range(MAX_UNREAD + 10):
            events.publish("started", "a", None, ())
        for _ in range(MAX_UNREAD):
            await anext(reader)
        with pytest.raises(ResourceExhausted):
            await anext(reader)


async def test_nobody_listens() -> None:
    Events().publish("created", "a", None, ())


async def test_the_number_of_readers_is_bounded() -> None:
    events = Events()
    async with AsyncExitStack() as stack:
        for _ in range(MAX_READERS):
            await stack.enter_async_context(events.subscribe())
        with pytest.raises(ResourceExhausted, match="64 clients"):
            await stack.enter_async_context(events.subscribe())
    async with events.subscribe():
        pass
