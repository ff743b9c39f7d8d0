"""What no record explains is removed: from the start on, every few minutes, kernel and files are compared with them.

It should find nothing: each thing that it does find is a leak, named by the log and counted by its kind. A stray is
removed when two looks have found it, so that nothing that is just being made, or removed, is taken for one; and only
what names this agent's own ids. What a record names that cannot be read belongs to that record.
"""

import asyncio
import logging
import os
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from nodeagent.cgroups import removals
from nodeagent.cgroups.manager import Cgroups
from nodeagent.errors import NodeAgentError
from nodeagent.images.catalog import Images
from nodeagent.lifecycle.containers.containers import Containers
from nodeagent.lifecycle.containers.creation import Creation
from nodeagent.lifecycle.inventory import Inventory
from nodeagent.lifecycle.places import Places
from nodeagent.lifecycle.pods.slots import Slots
from nodeagent.lifecycle.supervisors.launchers import Launchers
from nodeagent.net.network import Network
from nodeagent.tasks import Tasks

log = logging.getLogger(__name__)

PERIOD_SECONDS = 120.0
NAME = "reconciliation"

# pod: a supervisor or a directory. container: a directory. intention: a creation that nobody goes on with. lease: also
# the host ports of a pod. hold: of an image. cgroup: of a pod that has no parent from elsewhere, whose owner ends that.
KINDS = ("pod", "container", "intention", "lease", "hold", "cgroup")

_ID = re.compile(r"[0-9a-f]{64}")


class Stray(NamedTuple):
    """A thing without a record, or a record without a thing. id: of the pod or container that it belongs to."""

    kind: str
    id: str


class Reconciliation:
    """Looks for strays and removes them. leaks: how many were removed, by kind."""

    def __init__(
        self,
        *,
        inventory: Inventory,
        launchers: Launchers,
        slots: Slots,
        creation: Creation,
        containers: Containers,
        network: Network,
        images: Images,
        cgroups: Cgroups,
        places: Places,
        tasks: Tasks,
    ) -> None:
        self.leaks = Counter(dict.fromkeys(KINDS, 0))
        self._inventory = inventory
        self._launchers = launchers
        self._slots = slots
        self._creation = creation
        self._containers = containers
        self._network = network
        self._images = images
        self._cgroups = cgroups
        self._places = places
        self._tasks = tasks.part()
        self._suspects: set[Stray] = set()
        # How an unknown pod is removed, and what recovery has yet to remove: of `Recovery`, which is above us.
        self.dismantle: Callable[[Path], Awaitable[None]]
        self.is_recovering: Callable[[str], bool]

    def start(self) -> None:
        """Look from now on, in the background."""
        self._tasks.keep(NAME, self._keep)

    async def close(self) -> None:
        await self._tasks.close()

    async def _keep(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(PERIOD_SECONDS)

    async def look(self) -> None:
        """Find strays, and remove those that the look before has found as well."""
        found = await self._find()
        certain, self._suspects = found & self._suspects, found
        for stray in sorted(certain):
            await self._remove(stray)

    async def end_groups(self) -> None:
        """Remove the groups that no record explains, as an agent does that ends without a READY pod."""
        known = self._inventory.sandboxes.keys() | self._inventory.containers.keys()
        groups = await asyncio.to_thread(self._cgroups.of_pods_without_parent)
        for each in sorted(set(groups.values()) - known - self._inventory.unreadable):
            await self._remove(Stray("cgroup", each))

    async def _find(self) -> set[Stray]:
        # What is there first, then the records: whatever is made meanwhile has one.
        pods = await self._supervised() | await _ids(self._places.pods)
        directories = await _ids(self._places.containers)
        groups = set((await asyncio.to_thread(self._cgroups.of_pods_without_parent)).values())
        recorded = self._inventory
        known_pods = recorded.sandboxes.keys() | recorded.unreadable | self._slots.ids
        # Their network has been given back, unless that has failed.
        stopped = {pod_id for pod_id, pod in recorded.sandboxes.items() if pod.stopped_at}
        known = recorded.containers.keys() | recorded.unreadable
        found = {
            *(Stray("pod", each) for each in pods - known_pods),
            *(Stray("container", each) for each in directories - known),
            *self._intentions(),
            *(Stray("lease", each) for each in self._network.holders - (known_pods - stopped)),
            *(Stray("hold", each) for each in self._images.holders - known),
            *(Stray("cgroup", each) for each in groups - known - known_pods),
        }
        return {stray for stray in found if not self.is_recovering(stray.id)}

    async def _supervised(self) -> set[str]:
        """The pods that the launcher knows; none where it does not answer, which is others' to say."""
        try:
            launcher = await self._launchers.get()
            return set(await launcher.pods())
        except (NodeAgentError, OSError):
            return set()

    def _intentions(self) -> Iterator[Stray]:
        pods = self._inventory.sandboxes.keys() | self._inventory.unreadable
        for container in self._inventory.containers.values():
            is_finished = container.created_at and container.sandbox_id in pods
            if not is_finished and not self._creation.is_under_way(container.id):
                yield Stray("intention", container.id)

    async def _remove(self, stray: Stray) -> None:
        log.error('%s "%s": no record explains it; removing it', *stray)
        try:
            await self._removed(stray)
        except (NodeAgentError, OSError) as error:
            log.error('%s "%s": cannot be removed yet: %s', *stray, error)
        else:
            self.leaks[stray.kind] += 1

    async def _removed(self, stray: Stray) -> None:
        kind, name = stray
        if kind == "pod":
            await self.dismantle(self._places.pods / name)
        elif kind == "container":
            await self._containers.clear_stranger(name)
        elif kind == "intention":
            container = self._inventory.containers.get(name)
            if container is not None:
                await self._containers.undo(container)
        elif kind == "lease":
            await self._network.detach(name)
        elif kind == "hold":
            await self._images.release(name)
        else:
            await self._end_groups(name)

    async def _end_groups(self, name: str) -> None:
        for path, each in (await asyncio.to_thread(self._cgroups.of_pods_without_parent)).items():
            if each == name:
                await removals.in_thread(self._cgroups.end, path)


async def _ids(directory: Path) -> set[str]:
    """The names in a directory that are ids; others are nobody's business here."""
    names = await asyncio.to_thread(os.listdir, directory)
    return {name for name in names if _ID.fullmatch(name)}
