"""Lookups of paths of the node that a request names.

Such a path can be on a file system whose server is gone, where even a stat never returns. Each lookup has a thread of
its own, so that it blocks the request that named the path and nothing else: no event loop, no pool that others use.
"""

import asyncio
import os.path
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from nodeagent.errors import ResourceExhausted
from nodeagent.lifecycle.creations import doing
from nodeagent.linux import mountinfo

T = TypeVar("T")


class HostPaths:
    """Lookups with a limit on those under way on one file system; one that never returns counts until the agent ends.

    The file system is found by the name of the path alone, because resolving a link can hang as well.
    """

    def __init__(self, limit: int = 64) -> None:
        self._limit = limit
        self.under_way: dict[Future[Any], str] = {}

    async def look_up(self, what: str, path: str, function: Callable[[], T]) -> T:
        """Run `function`, which accesses `path`, and return or raise what it does.

        Raises ResourceExhausted, with `what`, at the limit of the file system that the path is on.
        """
        self._refuse_dead(what, path)
        doing(f"waiting for the filesystem at {path} ({what})")
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # a caller that gives up does not end it
        self.under_way[future] = path
        future.add_done_callback(self.under_way.pop)
        # A daemon thread: the end of the agent does not wait for one that never returns.
        threading.Thread(target=_run, args=(function, future), daemon=True).start()
        return await asyncio.wrap_future(future)

    def _refuse_dead(self, what: str, path: str) -> None:
        """Raise ResourceExhausted at the limit of the path's file system."""
        if (
            len(self.under_way) < self._limit
        ):  # for all together: the table of mounts is rarely read
            return
        points = {mount.point for mount in mountinfo.parse(mountinfo.table())}
        mount = mount_point(path, points)
        # A copy, as threads remove theirs meanwhile.
        blocked = sum(
            mount_point(other, points) == mount for other in list(self.under_way.values())
        )
        if blocked >= self._limit:
            raise ResourceExhausted(
                f'{what}: "{path}": {blocked} lookups on the filesystem at {mount} are still blocked; '
                "is it hung (NFS?)"
            )


def _run(function: Callable[[], T], future: Future[T]) -> None:
    try:
        result = function()
    except Exception as error:  # noqa: BLE001 the caller gets it
        future.set_exception(error)
    else:
        future.set_result(result)


def mount_point(path: str, points: set[str]) -> str:
    """The last mount point on the way to `path`, by its name alone."""
    path = os.path.normpath("/" + path.lstrip("/"))  # which keeps two slashes at the front
    while path not in points and path != "/":
        path = os.path.dirname(path)
    return path
