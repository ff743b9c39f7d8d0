"""Warm slots: supervisors with namespaces, link and addresses, waiting for a pod.

A slot has its pod's final id from the start, so taking one moves and renames nothing. It has no record: whatever has
a supervisor or a lease, but no sandbox, was a slot (or a pod that a crash cut off), and the next start removes it.
"""

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable, Coroutine
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nodeagent import files
from nodeagent.errors import NodeAgentError
from nodeagent.lifecycle.plan.mounts import id_map
from nodeagent.lifecycle.supervisors.launchers import Launchers
from nodeagent.net.network import Network
from nodeagent.requests import Namespaces
from nodeagent.sandbox import paths
from nodeagent.sandbox.agent.client import Launcher, Supervisor
from nodeagent.sandbox.spec import PodPlan
from nodeagent.tasks import Tasks, ended

log = logging.getLogger(__name__)

# The containers of a pod come right after it, and the next slot must not be in their way.
REFILL_DELAY_SECONDS = 0.05
RETRY_SECONDS = 1.0
END_SECONDS = 5.0  # what is left then has its supervisor killed
USUAL = Namespaces()
NAME = "warm slots"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A future pod, in which only its supervisor runs. addresses: empty on the node's network."""

    id: str
    directory: Path
    supervisor: Supervisor
    addresses: tuple[str, ...]


class Slots:
    """The warm slots of a node: `count` of the usual kind are kept ready."""

    def __init__(
        self, launchers: Launchers, network: Network, directory: Path, count: int, tasks: Tasks
    ) -> None:
        self._launchers = launchers
        self._network = network
        self._directory = directory
        self._count = count
        self._ready: deque[Slot] = deque()
        self._missing = asyncio.Semaphore(0)
        self._ids: set[str] = set()
        self._tasks = tasks.part()
        self._filling = self._tasks.part()

    def start(self) -> None:
        """Begin to fill, in the background."""
        for _ in range(self._count):
            self._missing.release()
        self._filling.keep(NAME, self._fill, longest_pause_seconds=RETRY_SECONDS)

    @property
    def ready(self) -> int:
        return len(self._ready)

    @property
    def ids(self) -> AbstractSet[str]:
        """The ids of slots that are there or just being made, or discarded; one that was taken is its taker's."""
        return self._ids

    async def take(self, namespaces: Namespaces) -> Slot:
        """Take a slot with these namespaces, ready or new; `discard` undoes it."""
        if namespaces.owned == USUAL.owned:
            while self._ready:
                slot = self._ready.popleft()
                asyncio.get_running_loop().call_later(REFILL_DELAY_SECONDS, self._missing.release)
                if self._is_good(slot):
                    return self._taken(slot)
                await self._undone(slot.id, partial(self.discard, slot))
        return self._taken(await self._make(namespaces))

    def _taken(self, slot: Slot) -> Slot:
        self._ids.discard(slot.id)
        return slot

    def _is_good(self, slot: Slot) -> bool:
        """Whether the slot can be used: the pod CIDR may be another one than when it was made."""
        return not slot.supervisor.is_lost and self._network.hands_out(slot.addresses)

    async def discard(self, slot: Slot) -> None:
        """Undo everything of a slot. A slot that is partly gone is fine."""
        if slot.supervisor.is_lost:
            await self._launchers.get()  # which makes its successor
        await dismantle(slot.id, slot.directory, slot.supervisor, self._network)
        self._ids.discard(slot.id)

    async def close(self) -> None:
        """Stop filling, and discard what is ready or was made in part."""
        await self._filling.close()
        while self._ready:
            slot = self._ready.popleft()
            self._tasks.keep(NAME, partial(self.discard, slot), about=f'pod "{slot.id}"')
        await self._tasks.settled(END_SECONDS)
        await self._tasks.close()

    async def _fill(self) -> None:
        """Make a slot for each that is missing."""
        while True:
            await self._missing.acquire()
            try:
                self._ready.append(await self._make(USUAL))
            except BaseException:
                self._missing.release()  # or this slot would be missing for ever
                raise

    async def _make(self, namespaces: Namespaces) -> Slot:
        pod_id = secrets.token_hex(32)
        directory = self._directory / pod_id
        owned = namespaces.owned
        launcher: Launcher | None = None
        supervisor: Supervisor | None = None
        addresses: tuple[str, ...] = ()
        self._ids.add(pod_id)
        try:
            directory.mkdir(mode=0o700)
            launcher = await self._launchers.get()
            supervisor = await launcher.fork(_plan(pod_id, directory, namespaces))
            if "net" in owned:
                handles = await supervisor.namespaces()
                with handles:
                    lease = await self._network.attach(pod_id, handles.net, handles.route)
                addresses = lease.addresses
        except BaseException:
            await self._undo(pod_id, directory, launcher, supervisor)
            raise
        return Slot(id=pod_id, directory=directory, supervisor=supervisor, addresses=addresses)

    async def _undo(
        self,
        pod_id: str,
        directory: Path,
        launcher: Launcher | None,
        supervisor: Supervisor | None,
    ) -> None:
        """Undo a slot that was made in part, also for a cancelled caller; what fails goes on behind it."""

        async def undo() -> None:
            if launcher is not None and supervisor is None:
                await launcher.undo_fork(pod_id, directory)
            await dismantle(pod_id, directory, supervisor, self._network)
            self._ids.discard(pod_id)

        await self._undone(pod_id, undo)

    async def _undone(self, pod_id: str, undo: Callable[[], Coroutine[Any, Any, None]]) -> None:
        about = f'pod "{pod_id}"'

        async def attempt() -> None:
            try:
                await undo()
            except (NodeAgentError, OSError) as error:
                log.warning('pod "%s": cannot be undone yet, which goes on: %s', pod_id, error)
                self._tasks.keep(NAME, undo, about=about)

        await ended([self._tasks.run(NAME, attempt(), about=about)])


async def dismantle(
    pod_id: str, directory: Path, supervisor: Supervisor | None, network: Network
) -> None:
    """Remove a pod's processes, network and directory, in this order. Idempotent."""
    if supervisor is not None:
        await supervisor.shutdown()
    await network.detach(pod_id)
    await asyncio.to_thread(files.remove_tree, str(directory))


async def remove_killed(directory: Path) -> None:
    """Remove the mounts and the directory of a pod whose supervisor was killed, and could not remove them itself."""
    paths.unpin(str(directory))
    await asyncio.to_thread(files.remove_tree, str(directory))


def _plan(pod_id: str, directory: Path, namespaces: Namespaces) -> PodPlan:
    owned = namespaces.owned
    plan = PodPlan(
        id=pod_id,
        directory=str(directory),
        namespaces=[name for name in ("net", "ipc", "uts", "user") if name in owned],
    )
    mapping = namespaces.user_mapping
    if mapping is not None:
        plan["uid_map"] = [id_map(line) for line in mapping.uids]
        plan["gid_map"] = [id_map(line) for line in mapping.gids]
    return plan
