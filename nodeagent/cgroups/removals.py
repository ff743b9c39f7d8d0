"""Threads for removals of groups, which wait for processes that end, and for those that never do.

They are not the event loop's own, of which there are few: commands and files of all pods would wait for the processes
of one.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

AT_ONCE = 64  # they sleep; a thread is made when it is needed

_threads = ThreadPoolExecutor(AT_ONCE, "cgroups")


async def in_thread(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Like `asyncio.to_thread`."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_threads, partial(call, *args, **kwargs))
