"""Recovery when an agent starts: it takes over what runs, and finishes or undoes what was cut off.

The truth comes from supervisors, exit records and the kernel; the store says what there should be. After a reboot
nothing can run: pods are stopped, containers have ended unobserved, leases and directories are removed.

Each pod is recovered by itself, and none can keep the node from starting: what has not succeeded within ANSWER_SECONDS
goes on while the agent serves. Until then a pod is listed as its records have it; it can be stopped and removed. A pod
is given up only for an error that the next attempt would find again, never for one that may pass.

What a record names that cannot be read is left as it is, whether it runs or not: a later release, or `nodeagent check
--repair`, may know more of it.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from nodeagent import records
from nodeagent.cgroups import removals
from nodeagent.cgroups.manager import Cgroups
from nodeagent.database import REMEDY
from nodeagent.errors import AlreadyExists, NodeAgentError, ResourceExhausted, Unavailable
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
from nodeagent.serving import service_manager

log = logging.getLogger(__name__)


# For all that has to be asked before the agent serves. Processes that run answer within milliseconds.
ANSWER_SECONDS = 5.0

# Errors of a pod that may pass: what it needs is not there now, or does not answer.
_MAY_PASS = (OSError, Unavailable, ResourceExhausted)
_FILES_ARE_GONE = (FileNotFoundError, NotADirectoryError)


class Recovery:
    """The recovery, begun once before the first request."""

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
        self._under_way: set[str] = set()

    async def run(self) -> None:
        """Return when the agent may serve, which ANSWER_SECONDS bound as far as other processes are concerned."""
        boot = boot_id()
        for sandbox in list(self._inventory.sandboxes.values()):
            if sandbox.boot_id != boot:
                self._rebooted(sandbox)
        unreadable = self._inventory.unreadable
        for name in sorted(unreadable):
            log.error(
                '"%s": its record cannot be read; what runs is left as it is: %s', name, REMEDY
            )
        await self._images.release_others(self._inventory.containers.keys() | unreadable)
        self._end_what_cannot_run()
        work = [*self._adoptions(), *self._undoing(), *self._clearing()]
        service_manager.notify(f"STATUS=taking over {len(self._inventory.pods)} pods")
        await self._answers(work)
        await self._network.recover(self._inventory.pods.keys() | unreadable)

    def is_under_way(self, name: str) -> bool:
        """Whether this pod or container is still being recovered."""
        return name in self._under_way

    def _begin(
        self, kind: str, name: str, work: Callable[[], Coroutine[Any, Any, None]]
    ) -> asyncio.Task[None]:
        self._under_way.add(name)
        task = self._supervision.recover(f'{kind} "{name}"', work)
        task.add_done_callback(lambda _: self._under_way.discard(name))
        return task

    async def _answers(self, work: Sequence[asyncio.Task[None]]) -> None:
        """Wait for parts of the recovery; name those that go on in the background."""
        if not work:
            return
        _, missing = await asyncio.wait(work, timeout=ANSWER_SECONDS)
        for task in missing:
            log.warning("%s: not finished within %g s, it goes on", task.get_name(), ANSWER_SECONDS)

    # --- pods that ran ---

    def _adoptions(self) -> Iterator[asyncio.Task[None]]:
        for sandbox in self._inventory.sandboxes.values():
            if sandbox.ready:
                self._supervision.expect(sandbox.id)
                yield self._begin("pod sandbox", sandbox.id, partial(self._adopt, sandbox.id))

    async def _adopt(self, sandbox_id: str) -> None:
        try:
            await self._supervision.adopt(sandbox_id)
        except (NodeAgentError, OSError) as error:
            if _may_pass(error):
                raise
            log.error('pod sandbox "%s": cannot be taken over, it ends: %s', sandbox_id, error)
            await self._end(sandbox_id)

    async def _end(self, sandbox_id: str) -> None:
        """End a pod that has no supervisor, and can have none. The record goes last: until then it is tried again."""
        sandbox = self._inventory.sandboxes.get(sandbox_id)
        if sandbox is None or not sandbox.ready:
            return
        await self._stopping.kill_all(sandbox_id)
        await self._remove_group(sandbox)
        for container in self._inventory.members(sandbox_id):
            if container.created_at and container.state != "exited":
                self._supervision.ended_as(records.lost(container, time.time_ns()))
        await self.dismantle(self._places.pods / sandbox_id)
        current = self._inventory.sandboxes.get(sandbox_id)
        if current is not None and current.ready:  # nobody has stopped it meanwhile
            stopped = msgspec.structs.replace(current, stopped_at=time.time_ns())
            self._inventory.note(stopped, "stopped")
            self._inventory.pods.pop(sandbox_id, None)

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

    # --- intentions ---

    def _undoing(self) -> Iterator[asyncio.Task[None]]:
        """Undo what an earlier agent has begun to make, and has not finished."""
        pods = self._inventory.sandboxes.keys() | self._inventory.unreadable
        for container in list(self._inventory.containers.values()):
            if not container.created_at or container.sandbox_id not in pods:
                yield self._begin(
                    "container", container.id, partial(self._containers.undo, container)
                )
        for sandbox in list(self._inventory.sandboxes.values()):
            if not sandbox.ready_at:
                yield self._begin("pod sandbox", sandbox.id, partial(self._undo_sandbox, sandbox))

    async def _undo_sandbox(self, sandbox: Sandbox) -> None:
        await cgroup.remove(self._cgroups, sandbox)
        self._inventory.forget(sandbox)

    async def _remove_group(self, sandbox: Sandbox) -> bool:
        """Remove the pod's cgroup; False if it cannot be, which the pod's removal or the next start tries again."""
        try:
            await cgroup.remove(self._cgroups, sandbox)
        except (NodeAgentError, OSError) as error:
            log.error('pod sandbox "%s": its cgroup cannot be removed yet: %s', sandbox.id, error)
            return False
        return True

    # --- what has no record ---

    def _clearing(self) -> Iterator[asyncio.Task[None]]:
        """Remove pods without a record, which were slots or cut off, and containers without one."""
        found = {directory.name for directory in self._places.pods.iterdir()}
        unreadable = self._inventory.unreadable
        for pod_id in found.difference(self._inventory.pods, unreadable):
            yield self._begin("pod", pod_id, partial(self.dismantle, self._places.pods / pod_id))
        for directory in self._places.containers.iterdir():
            if directory.name not in self._inventory.containers.keys() | unreadable:
                yield self._begin(
                    "container",
                    directory.name,
                    partial(self._containers.clear_stranger, directory.name),
                )
        yield self._supervision.recover("launcher", self._clear_launcher)

    async def _clear_launcher(self) -> None:
        """Remove the pods that only the launcher knows.

        The agent may serve by now: each of its own pods has a directory until its supervisor has ended.
        """
        launcher = await self._launchers.get()
        kept = set(await launcher.pods())
        known = self._inventory.pods.keys() | self._inventory.unreadable | self._under_way
        strangers = [self._places.pods / pod_id for pod_id in sorted(kept - known)]
        removals = [
            self._begin("pod", directory.name, partial(self.dismantle, directory))
            for directory in strangers
            if not directory.exists()
        ]
        if removals:
            await asyncio.wait(removals)

    async def dismantle(self, directory: Path) -> None:
        """Remove an unknown pod. Whoever calls this tries again after an error, until nothing is left."""
        supervisor = await self._reach(directory)
        await dismantle(directory.name, directory, supervisor, self._network)
        known = {sandbox.cgroup_parent for sandbox in self._inventory.sandboxes.values()}
        own = self._cgroups.pod_path(directory.name)
        for parent in known | {own}:
            await cgroup.remove_below(self._cgroups, parent, directory.name)
        # Of containers whose records are lost with the pod's: nobody else knows their parent.
        for path in await asyncio.to_thread(self._cgroups.of_pods_without_parent):
            if path.startswith(f"{own}/"):
                await removals.in_thread(self._cgroups.end, path)

    async def _reach(self, directory: Path) -> Supervisor | None:
        """The supervisor of a pod that is removed; None where there can be none, and nothing is left of one.

        Raises what may pass: the supervisor may live, and without the directory, where its socket is, nobody could
        reach it any more.
        """
        try:
            return await self._supervision.reach(directory.name)
        except (NodeAgentError, OSError) as error:
            if _may_pass(error):
                raise
            launcher = await self._launchers.get()
            # A supervisor that is there, and cannot be reached, is killed by the launcher that knows it.
            if isinstance(error, AlreadyExists) and directory.name not in await launcher.pods():
                raise
            log.error('pod "%s": removed without a supervisor: %s', directory.name, error)
        await launcher.abandon(directory.name)
        paths.unpin(str(directory))
        return None


def _may_pass(error: NodeAgentError | OSError) -> bool:
    return isinstance(error, _MAY_PASS) and not isinstance(error, _FILES_ARE_GONE)
