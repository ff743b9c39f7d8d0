"""Recovery before an agent serves: it takes over what runs, and finishes or undoes what was cut off.

The truth comes from supervisors, exit records and the kernel; the store says what there should be. After a reboot
nothing can run: pods are stopped, containers have ended unobserved, leases and directories are removed.

What a record names that cannot be read is left as it is, whether it runs or not: a later release, or `nodeagent check
--repair`, may know more of it.
"""

import asyncio
import logging
import time
from functools import partial
from pathlib import Path

import msgspec

from nodeagent import records
from nodeagent.cgroups.manager import Cgroups
from nodeagent.database import REMEDY
from nodeagent.errors import NodeAgentError
from nodeagent.images.catalog import Images
from nodeagent.lifecycle.containers.containers import Containers
from nodeagent.lifecycle.containers.stopping import Stopping
from nodeagent.lifecycle.inventory import Inventory, boot_id
from nodeagent.lifecycle.places import Places
from nodeagent.lifecycle.pods import cgroup
from nodeagent.lifecycle.pods.slots import dismantle
from nodeagent.lifecycle.supervisors.launchers import Launchers
from nodeagent.lifecycle.supervisors.supervision import Supervision
from nodeagent.net.network import Network
from nodeagent.records import Sandbox
from nodeagent.sandbox import paths
from nodeagent.sandbox.agent.client import Supervisor
from nodeagent.tasks import all_of

log = logging.getLogger(__name__)


class Recovery:
    """The recovery, run once before the first request."""

    def __init__(
        self,
        *,
        inventory: Inventory,
        supervision: Supervision,
        containers: Containers,
        stopping: Stopping,
        network: Network,
        images: Images,
        launchers: Launchers,
        cgroups: Cgroups,
        places: Places,
    ) -> None:
        self._inventory = inventory
        self._supervision = supervision
        self._containers = containers
        self._stopping = stopping
        self._network = network
        self._images = images
        self._launchers = launchers
        self._cgroups = cgroups
        self._places = places

    async def run(self) -> None:
        boot = boot_id()
        for sandbox in list(self._inventory.sandboxes.values()):
            if sandbox.boot_id != boot:
                self._rebooted(sandbox)
        unreadable = self._inventory.unreadable
        for name in sorted(unreadable):
            log.error(
                '"%s": its record cannot be read; what runs is left as it is: %s', name, REMEDY
            )
        self._images.release_others(self._inventory.containers.keys() | unreadable)
        self._end_what_cannot_run()
        ready = [s for s in self._inventory.sandboxes.values() if s.ready]
        await all_of(self._adopt(sandbox) for sandbox in ready)
        # After the adoption: what belongs to no adopted pod now is left over.
        await self._dismantle_strangers()
        await self._undo_intentions()
        await self._network.recover(self._inventory.pods.keys() | unreadable)

    async def _adopt(self, sandbox: Sandbox) -> None:
        try:
            await self._supervision.adopt(sandbox.id)
        except (NodeAgentError, OSError) as error:
            log.error('pod sandbox "%s": cannot be taken over, it ends: %s', sandbox.id, error)
            await self._stopping.kill_all(sandbox.id)
            await self._remove_group(sandbox)
            self._rebooted(sandbox)

    def _rebooted(self, sandbox: Sandbox) -> None:
        """Record that nothing of this pod can run any more."""
        now = time.time_ns()
        for container in self._inventory.members(sandbox.id):
            if container.created_at:
                self._inventory.save(records.lost(container, now))
        if sandbox.ready:
            self._inventory.save(msgspec.structs.replace(sandbox, stopped_at=now))

    def _end_what_cannot_run(self) -> None:
        """Record the end of containers whose pod's record cannot be read, where a reboot has taken its directory."""
        for container in list(self._inventory.containers.values()):
            pod = container.sandbox_id
            is_gone = pod in self._inventory.unreadable and not (self._places.pods / pod).exists()
            if is_gone and container.created_at:
                self._inventory.save(records.lost(container, time.time_ns()))

    async def _undo_intentions(self) -> None:
        unreadable = self._inventory.unreadable
        unfinished = [
            container
            for container in self._inventory.containers.values()
            if not container.created_at
            or container.sandbox_id not in self._inventory.sandboxes.keys() | unreadable
        ]
        await all_of(
            self._supervision.recover(
                f'container "{container.id}"', partial(self._containers.undo, container)
            )
            for container in unfinished
        )
        for sandbox in list(self._inventory.sandboxes.values()):
            if not sandbox.ready_at and await self._remove_group(sandbox):
                self._inventory.forget(sandbox)

    async def _remove_group(self, sandbox: Sandbox) -> bool:
        """Remove the pod's cgroup; False if it cannot be, which the pod's removal or the next start tries again."""
        try:
            await asyncio.to_thread(cgroup.remove, self._cgroups, sandbox)
        except (NodeAgentError, OSError) as error:
            log.error('pod sandbox "%s": its cgroup cannot be removed yet: %s', sandbox.id, error)
            return False
        return True

    async def _dismantle_strangers(self) -> None:
        """Remove pods without a record, which were slots or cut off, and containers without one."""
        launcher = await self._launchers.get()
        known = {directory.name for directory in self._places.pods.iterdir()}
        records = self._inventory.pods.keys() | self._inventory.unreadable
        strangers = known.union(await launcher.pods()) - records
        await all_of(
            self._supervision.recover(
                f'pod "{pod_id}"', partial(self._dismantle, self._places.pods / pod_id)
            )
            for pod_id in strangers
        )
        for directory in self._places.containers.iterdir():
            if directory.name not in self._inventory.containers.keys() | self._inventory.unreadable:
                await self._clear_stranger(directory.name)

    async def _clear_stranger(self, container_id: str) -> None:
        """Remove what there is of an unknown container; what a blocked process keeps is left to the next start."""
        try:
            await self._containers.clear_stranger(container_id)
        except (NodeAgentError, OSError) as error:
            log.error(
                'container "%s": cannot be removed until the next start: %s', container_id, error
            )

    async def _dismantle(self, directory: Path) -> None:
        """Remove an unknown pod."""
        supervisor = await self._reach(directory)
        await dismantle(directory.name, directory, supervisor, self._network)
        known = {sandbox.cgroup_parent for sandbox in self._inventory.sandboxes.values()}
        for parent in known | {self._cgroups.pod_path(directory.name)}:
            await asyncio.to_thread(cgroup.remove_below, self._cgroups, parent, directory.name)

    async def _reach(self, directory: Path) -> Supervisor | None:
        """The supervisor of a pod that is removed; None where there can be none, and nothing is left of one."""
        try:
            return await self._supervision.reach(directory.name)
        except (NodeAgentError, OSError) as error:
            log.error('pod "%s": removed without a supervisor: %s', directory.name, error)
        launcher = await self._launchers.get()
        await launcher.abandon(directory.name)
        paths.unpin(str(directory))
        return None
