"""RunPodSandbox, StopPodSandbox and RemovePodSandbox, without the wire.

Everything that a pod makes outside the store is named by its id: supervisor, directory, lease, cgroup. A sandbox record
without `ready_at` is the intention to make them; the record goes when all of them are gone.
"""

import asyncio
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from nodeagent import requests
from nodeagent.cgroups.manager import Cgroups
from nodeagent.errors import AlreadyExists, InvalidArgument, NotFound, Unavailable
from nodeagent.lifecycle.containers.containers import Containers
from nodeagent.lifecycle.containers.groups import Groups
from nodeagent.lifecycle.containers.removal import UNDO_SECONDS, undone
from nodeagent.lifecycle.containers.stopping import Stopping
from nodeagent.lifecycle.creations import PATIENCE_SECONDS, Creations, doing
from nodeagent.lifecycle.inventory import Inventory, Pod, boot_id
from nodeagent.lifecycle.plan import etc_files
from nodeagent.lifecycle.pods import cgroup
from nodeagent.lifecycle.pods.slots import Slot, Slots, dismantle
from nodeagent.lifecycle.supervisors.cgroup_files import supervisor_files
from nodeagent.lifecycle.supervisors.supervision import Supervision
from nodeagent.net.network import Network
from nodeagent.records import Sandbox
from nodeagent.requests import Resources, SandboxConfig
from nodeagent.sandbox.agent.client import Supervisor
from nodeagent.sandbox.spec import DEFAULT_SHM_BYTES, PodSettings
from nodeagent.tasks import Tasks


class Sandboxes:
    """The operations on pod sandboxes. All take an id or a unique prefix of one."""

    def __init__(
        self,
        *,
        inventory: Inventory,
        slots: Slots,
        network: Network,
        containers: Containers,
        stopping: Stopping,
        groups: Groups,
        supervision: Supervision,
        directory: Path,
        cgroups: Cgroups,
        handlers: Collection[str],
        tasks: Tasks,
    ) -> None:
        """Take the parts. handlers: the names of those that are configured."""
        self._inventory = inventory
        self._slots = slots
        self._network = network
        self._containers = containers
        self._stopping = stopping
        self._groups = groups
        self._supervision = supervision
        self._directory = directory
        self._cgroups = cgroups
        self._handlers = handlers
        self._tasks = tasks.part()
        self._creations = Creations(
            tasks, "pod creation", inventory.sandboxes.__contains__, 2 * PATIENCE_SECONDS
        )
        supervision.end_pod = self.stop

    def get(self, name: str) -> Sandbox:
        """The pod with this id or prefix. Raises NotFound."""
        return self._inventory.sandbox(name)

    def list(self) -> list[Sandbox]:
        return self._inventory.visible_sandboxes()

    @property
    def any_ready(self) -> bool:
        """Whether a pod is READY, or may be, as its record cannot be read."""
        sandboxes = self._inventory.sandboxes.values()
        return bool(self._inventory.unreadable) or any(sandbox.ready for sandbox in sandboxes)

    @property
    def not_answering(self) -> dict[str, str]:
        """Why the supervisors of pods do not answer, by the pod's id; empty when all do."""
        return {
            pod_id: pod.supervisor.silent
            for pod_id, pod in self._inventory.pods.items()
            if pod.supervisor is not None and pod.supervisor.silent
        }

    def verbose(self, name: str) -> dict[str, Any]:
        """The pod's supervisor, why it does not answer ("" where it does), and the pod's directory."""
        sandbox = self._inventory.sandbox(name)
        pod = self._inventory.pods.get(sandbox.id)
        supervisor = pod.supervisor if pod else None
        return {
            "pid": supervisor.pid if supervisor else 0,
            "notAnswering": supervisor.silent if supervisor else "",
            "directory": str(self._directory / sandbox.id),
        }

    # --- run ---

    async def run(self, config: SandboxConfig, runtime_handler: str = "") -> str:
        """Make a pod and return its id; it is READY, with its addresses, when this returns.

        A retry with the same uid, name, namespace and attempt joins a call that its caller gave up.
        """
        parent = admit(config, runtime_handler, self._handlers, self._cgroups)
        key = _identity(config)
        what = f'pod sandbox "{config.namespace}/{config.name}"'
        return await self._creations.join(
            key, what, lambda: self._run(config, runtime_handler, parent)
        )

    async def _run(self, config: SandboxConfig, runtime_handler: str, cgroup_parent: str) -> str:
        self._refuse_duplicate(config)
        doing("waiting for a supervisor with namespaces and addresses")
        slot = await self._slots.take(config.namespaces)
        sandbox = Sandbox(
            id=slot.id,
            config=config,
            runtime_handler=runtime_handler,
            cgroup_parent=cgroup_parent or self._cgroups.pod_path(slot.id),
            boot_id=boot_id(),
            created_at=time.time_ns(),
            addresses=tuple(address.partition("/")[0] for address in slot.addresses),
        )
        try:
            self._inventory.save(sandbox)
            await self._settle(slot, sandbox)
            self._inventory.pods[slot.id] = Pod(slot.supervisor)
            self._inventory.save(
                msgspec.structs.replace(sandbox, ready_at=time.time_ns()), "created", "started"
            )
        except BaseException:
            self._inventory.pods.pop(slot.id, None)
            await self._undo(slot, sandbox)
            raise
        self._supervision.watch(slot.id, slot.supervisor)
        return slot.id

    async def _undo(self, slot: Slot, sandbox: Sandbox) -> None:
        """Undo a pod that was not finished; what cannot be undone at once is tried again behind the caller."""
        about = f'pod sandbox "{sandbox.id}"'
        await undone(self._tasks, about, partial(self._clear, slot, sandbox))

    async def _clear(self, slot: Slot, sandbox: Sandbox) -> None:
        """Undo everything of a pod, and only then its record, by which the next start would find it."""
        await self._slots.discard(slot)
        await cgroup.remove(self._cgroups, sandbox)
        self._inventory.forget(sandbox)

    async def _settle(self, slot: Slot, sandbox: Sandbox) -> None:
        config = sandbox.config
        etc_files.write(slot.directory, config, sandbox.addresses)
        doing("waiting for its supervisor, which sets host name and sysctls")
        await self._configure(slot.supervisor, sandbox)
        if config.namespaces.network == "pod":
            await self._network.publish(slot.id, config.port_mappings)

    async def _configure(self, supervisor: Supervisor, sandbox: Sandbox) -> None:
        settings = _settings(sandbox.config)
        if settings["pid"] != "pod":
            await supervisor.configure(settings)
            return
        with supervisor_files(cgroup.make(self._cgroups, sandbox)) as fds:
            await supervisor.configure(settings, fds)

    def _refuse_duplicate(self, config: SandboxConfig) -> None:
        for other in self._inventory.sandboxes.values():
            if _identity(other.config) == _identity(config):
                if not other.ready_at:
                    raise Unavailable(
                        f'pod sandbox "{config.namespace}/{config.name}": an earlier creation of attempt '
                        f'{config.attempt} of uid "{config.uid}" ({other.id}) is still being undone'
                    )
                raise AlreadyExists(
                    f'pod sandbox "{config.namespace}/{config.name}": attempt {config.attempt} of '
                    f'uid "{config.uid}" is {other.id}; remove it first, or use another attempt'
                )

    # --- stop and remove ---

    async def stop(self, name: str) -> None:
        """End every process of the pod and give its network back. Success when it is gone already."""
        try:
            sandbox = self._inventory.sandbox(name)
        except NotFound:
            return
        pod = self._inventory.pods.get(sandbox.id)
        if pod is None:
            return
        async with pod.lock:
            await self._stop(sandbox, pod)

    async def _stop(self, sandbox: Sandbox, pod: Pod) -> None:
        pod.closing = True
        for task in tuple(pod.creating):
            task.cancel()
        await self._stopping.stop_all(sandbox.id)
        # Only now: the supervisor that undoes them may be blocked by a container that ran, in a pipe that it held. One
        # that hangs is not waited for: what it has made so far is killed, and removed with the pod.
        if pod.creating:
            await asyncio.wait(pod.creating, timeout=UNDO_SECONDS)
        await self._supervision.shut_down(sandbox.id)
        await cgroup.remove(self._cgroups, sandbox)
        current = self._inventory.sandboxes.get(sandbox.id)
        # A removal, which has stopped the pod before, may have been faster than a stop that came second.
        if current is not None and not current.stopped_at:
            # What cannot be written has not happened, though nothing runs any more: the next agent would find it READY.
            self._inventory.write_noted(self._inventory.members(sandbox.id))
            self._inventory.save(
                msgspec.structs.replace(current, stopped_at=time.time_ns()), "stopped"
            )
        # Last: another pod may have its address and its host ports at once, and no two that are READY share them. What
        # a crash leaves of them goes with the next start, and what fails with the reconciliation.
        await self._network.detach(sandbox.id)

    async def remove(self, name: str) -> None:
        """Stop the pod if need be, remove its containers, and forget it. Idempotent."""
        try:
            sandbox = self._inventory.sandbox(name)
        except NotFound:
            return
        await self.stop(sandbox.id)
        for container in self._inventory.members(sandbox.id):
            if container.created_at:
                await self._containers.remove(container.id)
            else:  # its creation was cut off with an earlier agent, and could not be undone yet
                await self._containers.clear(container)
        await dismantle(sandbox.id, self._directory / sandbox.id, None, self._network)
        await cgroup.remove(self._cgroups, sandbox)
        self._inventory.forget(sandbox)

    # --- update ---

    async def update_resources(
        self, name: str, overhead: Resources | None, resources: Resources | None
    ) -> None:
        """Enforce the pod's limits on its cgroup and remember them. None, 0 and empty leave them as they are."""
        sandbox = self._inventory.sandbox(name)
        config = msgspec.structs.replace(
            sandbox.config,
            overhead=_updated(sandbox.config.overhead, overhead),
            resources=_updated(sandbox.config.resources, resources),
        )
        changed = msgspec.structs.replace(sandbox, config=config)
        self._groups.limit_pod(changed)
        self._inventory.save(changed)

    async def close(self) -> None:
        """Undo what is under way."""
        await self._creations.close()
        await self._tasks.close()


def admit(
    config: SandboxConfig, runtime_handler: str, handlers: Collection[str], cgroups: Cgroups
) -> str:
    """The whole path of the cgroup parent that is asked for, "" for none.

    Raises InvalidArgument for what no pod of this node can have. handlers: those of the configuration.
    """
    if runtime_handler and runtime_handler not in handlers:
        raise InvalidArgument(
            f'runtime handler "{runtime_handler}": not configured, there are '
            + ", ".join(f'"{name}"' for name in sorted({"", *handlers}))
        )
    return cgroups.parent_path(config.cgroup_parent) if config.cgroup_parent else ""


def _updated(old: Resources | None, new: Resources | None) -> Resources | None:
    return requests.updated(old, new) if old and new else new or old


def _identity(config: SandboxConfig) -> tuple[str, str, str, int]:
    return config.uid, config.namespace, config.name, config.attempt


def _settings(config: SandboxConfig) -> PodSettings:
    namespaces = config.namespaces
    on_node = namespaces.network == "node"
    return PodSettings(
        hostname=None if on_node else etc_files.hostname(config),
        sysctls=config.sysctls,
        shm_bytes=None if namespaces.ipc == "node" else DEFAULT_SHM_BYTES,
        pid="pod" if namespaces.pid == "pod" else "container",
    )
