"""Removals of cgroups that wait for processes, beside everything else that takes a thread."""

import asyncio
import threading
from typing import cast

from nodeagent.cgroups.manager import Cgroups
from nodeagent.lifecycle.containers.groups import Groups
from nodeagent.tasks import all_of


class Waiting:
    """Cgroups whose removal waits."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.waiting = 0

    def container_path(self, parent: str, container_id: str) -> str:
        return f"{parent}/{container_id}"

    def end(self, _path: str) -> None:
        self.waiting += 1
        self.over.wait(60)


async def test_removals_that_wait_keep_no_thread_from_others() -> None:
    """An ExecSync of another pod took two seconds longer for each."""
    cgroups = Waiting()
    groups = Groups(cast(Cgroups, cgroups))
    removals = asyncio.ensure_future(
        all_of([groups.remove_at("/parent", f"container-{n}") for n in range(40)])
    )
    try:
        while cgroups.waiting < 40:  # noqa: ASYNC110 a thread tells
            await asyncio.sleep(0.001)
        async with asyncio.timeout(30):
            assert await asyncio.to_thread(lambda: "done") == "done"
        assert not removals.done()
    finally:
        cgroups.over.set()
        await removals
