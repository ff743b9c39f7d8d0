"""Looks at paths of the node that a request names.

Such a path can be on a file system whose server is gone, where even a stat never returns. Each look has a thread of its
own, so that it holds up the request that named it and nothing else: no event loop, no pool that others wait for.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from nodeagent.errors import ResourceExhausted

T = TypeVar("T")


class HostPaths:
    """limit: of looks under way; one that never returns is under way until the agent ends."""

    def __init__(self, limit: int = 64) -> None:
        self._limit = limit
        self.under_way: set[Future[Any]] = set()

    async def look(self, what: str, function: Callable[[], T]) -> T:
        """What `function` returns or raises. Raises ResourceExhausted, with `what`, at the limit."""
        if len(self.under_way) >= self._limit:
            raise ResourceExhausted(
                f"{what}: {self._limit} looks at paths of this node have not returned; "
                "is one of its file systems dead?"
            )
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # a caller that gives up does not end it
        self.under_way.add(future)
        future.add_done_callback(self.under_way.discard)
        threading.Thread(target=_run, args=(function, future), daemon=True).start()
        return await asyncio.wrap_future(future)


def _run(function: Callable[[], T], future: Future[T]) -> None:
    try:
        result = function()
    except Exception as error:  # noqa: BLE001 whoever looks gets it
        future.set_exception(error)
    else:
        future.set_result(result)
