"""Looks at paths of the node that a request names.

Such a path can be on a file system whose server is gone, where even a stat never returns. Each look has a thread of its
own, so that it holds up the request that named it and nothing else: no event loop, no pool that others wait for.
"""

import asyncio
import os.path
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from nodeagent.errors import ResourceExhausted
from nodeagent.linux import mountinfo

T = TypeVar("T")


class HostPaths:
    """limit: of looks under way at one file system; one that never returns is under way until the agent ends.

    A file system is told by the name of the path, for to resolve a link can hang as well.
    """

    def __init__(self, limit: int = 64) -> None:
        self._limit = limit
        self.under_way: dict[Future[Any], str] = {}

    async def look(self, what: str, path: str, function: Callable[[], T]) -> T:
        """What `function`, which is about `path`, returns or raises.

        Raises ResourceExhausted, with `what`, at the limit of the file system that the path is on.
        """
        self._refuse_dead(what, path)
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # a caller that gives up does not end it
        self.under_way[future] = path
        future.add_done_callback(self.under_way.pop)
        threading.Thread(target=_run, args=(function, future), daemon=True).start()
        return await asyncio.wrap_future(future)

    def _refuse_dead(self, what: str, path: str) -> None:
        """The table of mounts is read only when there is something to count."""
        if len(self.under_way) < self._limit:
            return
        points = {mount.point for mount in mountinfo.parse(mountinfo.table())}
        mount = mount_point(path, points)
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
    except Exception as error:  # noqa: BLE001 whoever looks gets it
        future.set_exception(error)
    else:
        future.set_result(result)


def mount_point(path: str, points: set[str]) -> str:
    """The last mount point on the way to `path`, by its name alone."""
    path = os.path.normpath("/" + path.lstrip("/"))  # which keeps two slashes at the front
    while path not in points and path != "/":
        path = os.path.dirname(path)
    return path
