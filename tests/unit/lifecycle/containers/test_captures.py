"""The output of commands, kept within the bounds of a stream and of the node."""

import asyncio
import os

import pytest

from nodeagent.lifecycle.containers import captures
from nodeagent.lifecycle.containers.captures import MAX_OUTPUT_BYTES, START_BYTES, Captures
from tests.support.faults import until


async def put(capture: captures.Capture, size: int) -> None:
    """Write to it as a command would, to the last byte."""
    writer = os.dup(capture.writer)
    capture.start()
    await asyncio.to_thread(os.write, writer, bytes(size))
    os.close(writer)
    await until(lambda: capture._reader < 0)


async def test_output_is_kept_and_given_away() -> None:
    room = Captures(1 << 20)
    with room.open("it") as capture:
        await put(capture, START_BYTES + 1000)
        assert room.room == (1 << 20) - 1000
        assert capture.take() == bytes(START_BYTES + 1000)
        assert capture.take() == b""
    assert room.room == 1 << 20


async def test_a_stream_has_a_bound() -> None:
    with Captures(1 << 30).open("it") as capture:
        await put(capture, MAX_OUTPUT_BYTES + 100_000)
        assert len(capture.take()) == MAX_OUTPUT_BYTES


async def test_the_node_has_a_bound_and_each_stream_its_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    room = Captures(100_000)
    with room.open("the first") as first, room.open("the second") as second:
        await put(first, START_BYTES + 90_000)
        await put(second, 1_000_000)
        assert room.room == 0
        assert len(first.take()) == START_BYTES + 90_000
        assert len(second.take()) == START_BYTES + 10_000
    assert room.room == 100_000
    [warning] = caplog.messages
    assert warning.startswith(f"the second: cut after {START_BYTES + 10_000} bytes: ")


async def test_nothing_is_kept_after_a_gap() -> None:
    room = Captures(100_000)
    with room.open("first") as first, room.open("second") as second:
        second.start()
        await put(first, START_BYTES + 100_000)
        second._keep(bytes(START_BYTES) + b"cut")
        first.close()
        second._keep(b"later")
        assert second.take() == bytes(START_BYTES)


async def test_a_capture_that_was_not_started_leaves_no_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with Captures().open("it"):
        pass
    assert len(os.listdir("/proc/self/fd")) == before
