"""What no record explains is removed: from the start on, every few minutes, kernel and files are compared with them.

It should find nothing: each thing that it does find is a leak, named by the log and counted by its kind. A stray is
removed when two looks have found it, so that nothing that is just being made, or removed, is taken for one; and only
what names this agent's own ids, or is in a table or a directory of its own. What a record names that cannot be read
belongs to that record. What could not be listed is not taken for gone: the next look that can list it goes on from the
last one that could.
"""

import asyncio
import logging
import os
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from nodeagent.cgroups import removals
from nodeagent.cgroups.manager import Cgroups
from nodeagent.errors import NodeAgentError
from nodeagent.images.catalog import Images
from nodeagent.lifecycle import own_mounts
from nodeagent.lifecycle.containers.containers import Containers
from nodeagent.lifecycle.containers.creation import Creation
from nodeagent.lifecycle.inventory import Inventory
from nodeagent.lifecycle.places import Places
from nodeagent.lifecycle.pods.slots import Slots
from nodeagent.lifecycle.supervisors.launchers import Launchers
from nodeagent.net.network import Network
from nodeagent.tasks import Tasks, to_the_end
from nodeagent.text import one_line

log = logging.getLogger(__name__)

PERIOD_SECONDS = 120.0
NAME = "reconciliation"

# pod: a supervisor or a directory. container: a directory. intention: a creation that nobody goes on with. lease: also
# the host ports of a pod. hold: of an image. cgroup: of a pod that has no parent from elsewhere, whose owner ends that.
# element: of an nft table of the agent's, for a host port or an address that a pod may send from. mount: of the agent's
# mount namespace, in a pod's or container's directory, or in what is on its way out. They are removed in this order:
# with a pod go its mounts.
KINDS = ("pod", "container", "intention", "lease", "hold", "cgroup", "element", "mount")

_ID = re.compile(r"[0-9a-f]{64}")

T = TypeVar("T")


class Stray(NamedTuple):
    """A thing without a record, or a record without a thing.

    id: of the pod or container that it belongs to; of an element what nft(8) writes, of a mount its path.
    """

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
        # The kinds that the present look could not list, or not all of.
        self._unlisted: set[str] = set()
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
        before, self._suspects = self._suspects, set(found)
        self._suspects.update(stray for stray in before if stray.kind in self._unlisted)
        for stray in sorted(found & before, key=lambda stray: (KINDS.index(stray.kind), stray.id)):
            await self._remove(stray)

    async def end_groups(self) -> None:
        """Remove the groups that no record explains, as an agent does that ends without a READY pod."""
        known = self._inventory.sandboxes.keys() | self._inventory.containers.keys()
        groups = await asyncio.to_thread(self._cgroups.of_pods_without_parent)
        for each in sorted(set(groups.values()) - known - self._inventory.unreadable):
            await self._remove(Stray("cgroup", each))

    async def _find(self) -> set[Stray]:
        # What is there first, then the records: whatever is made meanwhile has one.
        self._unlisted.clear()
        pods = await self._listed("pod", self._supervised, set[str]())
        pods |= await self._listed("pod", partial(_ids, self._places.pods), set[str]())
        directories = await self._listed(
            "container", partial(_ids, self._places.containers), set[str]()
        )
        groups = await self._listed("cgroup", self._grouped, set[str]())
        strays = await self._listed("element", self._network.strays, set[str]())
        mounts = await self._listed("mount", self._mounted, dict[str, Path]())
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
        found = {stray for stray in found if not self.is_recovering(stray.id)}
        # A stopped pod has no namespace to pin; a container mounts in its own mount namespace.
        mounting = (known_pods - stopped) | recorded.unreadable
        unexplained = (
            Stray("mount", point)
            for point, entry in mounts.items()
            if entry.name not in mounting and not self.is_recovering(entry.name)
        )
        return found.union(unexplained, (Stray("element", each) for each in strays))

    async def _listed(self, kind: str, listing: Callable[[], Awaitable[T]], nothing: T) -> T:
        """What a listing has. One that fails has nothing, and leaves what was suspected of its kind as it was."""
        try:
            return await listing()
        except (NodeAgentError, OSError) as error:
            log.warning("%ss: cannot all be listed, a stray may be missed: %s", kind, error)
            self._unlisted.add(kind)
            return nothing

    async def _supervised(self) -> set[str]:
        """The pods that the launcher knows."""
        launcher = await self._launchers.get()
        return set(await launcher.pods())

    async def _grouped(self) -> set[str]:
        groups = await asyncio.to_thread(self._cgroups.of_pods_without_parent)
        return set(groups.values())

    async def _mounted(self) -> dict[str, Path]:
        """Mount points, with the directories of pods, containers, or things on their way out that they are in."""
        places = self._places
        named = (places.pods, places.containers)
        mounts = await asyncio.to_thread(own_mounts.below, (*named, places.trash, places.staging))
        return {
            point: entry
            for point, entry in mounts.items()
            if entry.parent not in named or _ID.fullmatch(entry.name)
        }

    def _intentions(self) -> Iterator[Stray]:
        pods = self._inventory.sandboxes.keys() | self._inventory.unreadable
        for container in self._inventory.containers.values():
            is_finished = container.created_at and container.sandbox_id in pods
            if not is_finished and not self._creation.is_under_way(container.id):
                yield Stray("intention", container.id)

    async def _remove(self, stray: Stray) -> None:
        """Remove it, and count it; what has gone meanwhile, as the mounts of a stray pod do, is not counted."""
        name = one_line(stray.id)  # of a mount, it may be a container's word
        log.error('%s "%s": no record explains it; removing it', stray.kind, name)
        try:
            self.leaks[stray.kind] += await self._removed(stray)
        except (NodeAgentError, OSError) as error:
            log.error('%s "%s": cannot be removed yet: %s', stray.kind, name, error)

    async def _removed(self, stray: Stray) -> bool:
        """Remove it; False where that was not needed any more."""
        kind, name = stray
        if kind == "element":
            return await self._network.remove_stray(name)
        if kind == "mount":
            return await to_the_end(None, partial(own_mounts.detach, name))
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
        return True

    async def _end_groups(self, name: str) -> None:
        for path, each in (await asyncio.to_thread(self._cgroups.of_pods_without_parent)).items():
            if each == name:
                await removals.in_thread(self._cgroups.end, path)


async def _ids(directory: Path) -> set[str]:
    """The names in a directory that are ids; others are nobody's business here."""
    names = await asyncio.to_thread(os.listdir, directory)
    return {name for name in names if _ID.fullmatch(name)}
