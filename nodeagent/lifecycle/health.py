"""Checks of what keeps the runtime from working, for its condition RuntimeReady: the first problem that is found.

A full disk is not among them: a node that is not ready frees nothing.
"""

import asyncio
import logging
import os
from pathlib import Path
from typing import NamedTuple

from nodeagent.cgroups.manager import Cgroups
from nodeagent.lifecycle.places import Places
from nodeagent.lifecycle.plan.host_paths import HostPaths
from nodeagent.lifecycle.supervisors.launchers import Launchers
from nodeagent.store import Store
from nodeagent.tasks import Tasks

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # the longest that a caller waits
HUNG_SECONDS = (
    10.0  # a busy machine may take longer than LOOK_SECONDS, and pods are not evicted for it
)


class Trouble(NamedTuple):
    """A problem of the runtime. reason: one word, for programs. Both are empty where there is none."""

    reason: str
    message: str


NONE = Trouble("", "")


class Health:
    """Checks when it is asked, which is every few seconds, and logs what has changed."""

    def __init__(
        self, places: Places, cgroups: Cgroups, launchers: Launchers, store: Store, tasks: Tasks
    ) -> None:
        self._directories = {path: _identity(path) for path in (places.root, places.pods)}
        self._cgroups = cgroups
        self._launchers = launchers
        self._store = store
        self._paths = HostPaths()
        self._tasks = tasks
        self._looking: asyncio.Task[None] | None = None
        self._look_began = 0.0
        self._seen = NONE
        self._said = NONE

    async def trouble(self) -> Trouble:
        """The first problem; answers within LOOK_SECONDS, whatever the file systems do."""
        found = await self._find()
        if found != self._said:
            self._said = found
            if found == NONE:
                log.info("RuntimeReady: true again")
            else:
                log.error("RuntimeReady: false: %s: %s", *found)
        return found

    async def _find(self) -> Trouble:
        if self._launchers.trouble:
            return Trouble("LauncherGone", f"no launcher: {self._launchers.trouble}")
        if text := self._store.trouble():
            return Trouble("StoreNotWritable", text)
        return await self._look_at_paths()

    async def _look_at_paths(self) -> Trouble:
        """Check the paths in a thread, as one may be covered by a file system that never answers; one check at a time.

        Until it counts as hung, and after one that failed, the result of the last one holds.
        """
        now = asyncio.get_running_loop().time
        if self._looking is None or self._looking.done():
            self._look_began = now()
            self._looking = self._tasks.run("health", self._look())
        done, _ = await asyncio.wait((self._looking,), timeout=LOOK_SECONDS)
        if not done and now() - self._look_began > HUNG_SECONDS:
            names = ", ".join(map(str, self._directories))
            self._seen = Trouble(
                "NotAnswering",
                f"a lookup of {names} and the cgroup hierarchies is still blocked; is one of their filesystems hung?",
            )
        return self._seen

    async def _look(self) -> None:
        path = str(next(iter(self._directories)))
        self._seen = await self._paths.look_up("status", path, self._paths_trouble)

    def _paths_trouble(self) -> Trouble:
        try:
            covered = self._cgroups.covered()
        except OSError as error:
            return Trouble("CgroupsUnreadable", f"the cgroup hierarchies: {error}")
        if covered:
            return Trouble(
                "CgroupRootCovered",
                f"{covered}: another mount covers the cgroup hierarchy of this node; find it in "
                "/proc/self/mountinfo, end the pod that made it, and unmount it",
            )
        for path, identity in self._directories.items():
            try:
                if _identity(path) != identity:
                    return Trouble(
                        "DirectoryReplaced",
                        f"{path}: another directory or mount is there than when the agent was started; "
                        "unmount or move it, or restart the agent",
                    )
                if os.statvfs(path).f_flag & os.ST_RDONLY:
                    return Trouble(
                        "ReadOnly",
                        f"{path}: its filesystem is read-only; the kernel's log says why it has become so",
                    )
            except OSError as error:
                return Trouble("DirectoryGone", f"{path}: {error.strerror}")
        return NONE


def _identity(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino
