"""The operations on existing containers: StartContainer, RemoveContainer, UpdateContainerResources, ExecSync and more.

CreateContainer is in `creation`, StopContainer in `stopping`.
"""

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from nodeagent import records, requests
from nodeagent.errors import (
    FailedPrecondition,
    IncompatibleVersion,
    NotFound,
    StartError,
    Unavailable,
)
from nodeagent.lifecycle.containers import exec_sync, held_up, oom_at_start, oom_score
from nodeagent.lifecycle.containers.captures import Captures
from nodeagent.lifecycle.containers.directories import Directories
from nodeagent.lifecycle.containers.groups import Groups
from nodeagent.lifecycle.containers.removal import Removal
from nodeagent.lifecycle.containers.stopping import Stopping
from nodeagent.lifecycle.creations import doing
from nodeagent.lifecycle.inventory import Inventory
from nodeagent.lifecycle.supervisors.supervision import Supervision
from nodeagent.records import Container
from nodeagent.requests import Resources
from nodeagent.sandbox import planfile
from nodeagent.sandbox.agent.client import Supervisor
from nodeagent.sandbox.seccomp import effective as seccomp_effective
from nodeagent.sandbox.spec import ContainerPlan

log = logging.getLogger(__name__)

LOCK_SECONDS = 10.0  # starts, removals and updates take milliseconds unless something hangs


class Containers:
    """The verbs of a container. All take an id or a unique prefix of it."""

    def __init__(
        self,
        *,
        inventory: Inventory,
        supervision: Supervision,
        groups: Groups,
        stopping: Stopping,
        removal: Removal,
        directories: Directories,
        pods: Path,
    ) -> None:
        """Take the parts. pods: what containers that run have in the state directory."""
        self._inventory = inventory
        self._supervision = supervision
        self._groups = groups
        self._stopping = stopping
        self._removal = removal
        self._directories = directories
        self._pods = pods
        self._captures = Captures()

    def get(self, name: str) -> Container:
        """The container with this id or prefix. Raises NotFound."""
        return self._inventory.container(name)

    def list(self) -> list[Container]:
        return self._inventory.visible_containers()

    def verbose(self, name: str) -> dict[str, Any]:
        """The plan that its supervisor executed; empty after a reboot. "error" says why it cannot be read.

        The seccomp program is described by what it does: the names of system calls by action.
        """
        container = self._inventory.container(name)
        try:
            return _readable(planfile.load(str(self._pods / container.sandbox_id), container.id))
        except FileNotFoundError:
            return {}
        except (IncompatibleVersion, OSError, ValueError) as error:
            return {"error": str(error)}

    def of(self, sandbox_id: str) -> tuple[Container, ...]:
        """The containers of a pod, oldest first."""
        return tuple(c for c in self._inventory.members(sandbox_id) if c.created_at)

    # --- start ---

    async def start(self, name: str) -> None:
        """Execute the program. Raises StartError, with the container EXITED, when it cannot be.

        Raises TimeoutError, with what holds it up, when that takes long: it goes on, and a retry joins it.
        """
        container_id = self._inventory.container(name).id
        what = f'container "{container_id}"'
        await self._supervision.starts.join(container_id, what, lambda: self._start(container_id))

    async def _start(self, container_id: str) -> str:
        async with self._inventory.lock(container_id):
            container = self._inventory.container(container_id)
            if container.state != "created":
                raise FailedPrecondition(
                    f'container "{container_id}": is {container.state}, not created'
                )
            group, supervisor = self._groups.of(container), self._inventory.supervisor(container)
            doing(
                "waiting for its first process, which is to execute the program",
                partial(held_up.why, supervisor, group),
            )
            with (
                self._stopping.start_of(container_id),
                self._supervision.start_of(container_id),
                oom_at_start.named(container, group),
            ):
                try:
                    at = await supervisor.start(container_id)
                except StartError as error:
                    failed = records.start_failed(container, str(error), time.time_ns())
                    self._supervision.ended_as(failed)
                    raise
                self._supervision.started(container, at)
        return container_id

    # --- remove ---

    async def remove(self, name: str) -> None:
        """Kill the container if it runs, and forget it. Idempotent."""
        try:
            container = self._inventory.container(name)
        except NotFound:
            return
        # Not under the lock, which a start that is under way holds until it is stopped.
        await self._stopping.stop(container.id, 0)
        async with self._inventory.lock(container.id):
            if container.id in self._inventory.containers:
                await self.clear(self._inventory.containers[container.id])

    async def clear(self, container: Container) -> None:
        """Remove what there is of a container that does not run, finished or not, then its record."""
        await self._removal.clear(container)

    async def undo(self, container: Container) -> None:
        """Remove what a creation has made that an earlier agent did not finish.

        Until that succeeds, the container keeps its record, and with it its name.
        """
        if container.id in self._inventory.containers:
            await self.clear(container)

    async def clear_stranger(self, container_id: str) -> None:
        """Remove what there is of a container without a record, of whichever pod it was."""
        parents = {sandbox.cgroup_parent for sandbox in self._inventory.sandboxes.values()}
        for parent in parents:
            await self._groups.remove_at(parent, container_id)
        await self._directories.take(container_id)

    # --- running containers ---

    async def update(self, name: str, resources: Resources) -> None:
        """Put new limits in force, all or none, and remember them; 0 and empty leave a limit as it is.

        Raises Unavailable for a container that is being started, where that takes long.
        """
        container_id = self._inventory.container(name).id
        async with self._locked(container_id):
            container = self._inventory.container(container_id)
            if container.state == "exited":
                raise FailedPrecondition(f'container "{name}": is exited')
            group, old = self._groups.of(container), container.resources
            with oom_score.changed(group.processes, old.oom_score_adj, resources.oom_score_adj):
                group.apply(resources)
            merged = requests.updated(old, resources)
            self._inventory.save(msgspec.structs.replace(container, resources=merged))

    @asynccontextmanager
    async def _locked(self, container_id: str) -> AsyncIterator[None]:
        """The container's lock, for which nobody waits as long as a start may hold it."""
        lock = self._inventory.lock(container_id)
        try:
            async with asyncio.timeout(LOCK_SECONDS):
                await lock.acquire()
        except TimeoutError:
            raise Unavailable(
                f'container "{container_id}": is being started or removed, which takes long; try again later'
            ) from None
        try:
            yield
        finally:
            lock.release()

    async def exec_sync(
        self, name: str, argv: tuple[str, ...], timeout_s: float
    ) -> exec_sync.ExecResult:
        """Run a command in a running container to its end; see the module `exec_sync`."""
        container, supervisor = self.running(name)
        group = self._groups.of(container)
        return await exec_sync.exec_sync(
            supervisor, group, self._captures, container, argv, timeout_s
        )

    async def reopen_log(self, name: str) -> None:
        """Have the log written to a new file; afterwards no byte goes to the old one."""
        container, supervisor = self.running(name)
        await supervisor.reopen_log(container.id)

    def running(self, name: str) -> tuple[Container, Supervisor]:
        """A running container and its supervisor. Raises FailedPrecondition for one that does not run."""
        container = self._inventory.container(name)
        if container.state != "running":
            raise FailedPrecondition(f'container "{name}": is {container.state}, not running')
        return container, self._inventory.supervisor(container)


def _readable(made: ContainerPlan) -> dict[str, Any]:
    """A plan as JSON of text, its seccomp program in words."""
    # Bytes that are no text are escaped there, which the answer cannot have.
    readable = json.dumps(made, ensure_ascii=False).encode(errors="replace")
    plan: dict[str, Any] = msgspec.json.decode(readable)
    program = base64.b64decode(plan["process"]["seccomp"])
    plan["process"]["seccomp"] = seccomp_effective.describe(program)
    plan.get("hooks", {}).pop("config", None)  # the same again, in other words
    return plan
