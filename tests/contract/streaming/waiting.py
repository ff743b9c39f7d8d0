"""Waits for what another process, or the server, is about to do."""

import asyncio
import time
from collections.abc import Awaitable, Callable


async def eventually(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(0.01)


async def until_blocked(write: Callable[[bytes], Awaitable[None]], within_s: float = 0.4) -> int:
    """Write without end; return how many bytes were taken once no more are, or when the time is over."""
    written = 0
    try:
        async with asyncio.timeout(within_s):
            while True:
                await write(bytes(32 << 10))
                written += 32 << 10
    except TimeoutError:
        return written
