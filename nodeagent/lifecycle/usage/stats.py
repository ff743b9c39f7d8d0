"""Present usage of containers and pods: cgroup accounting, writable layers, network.

One container whose cgroup vanished is left out; it never fails a list.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nodeagent.cgroups.stats import CgroupStats
from nodeagent.errors import NodeAgentError, NotFound
from nodeagent.lifecycle.containers.containers import Containers
from nodeagent.lifecycle.containers.groups import Groups
from nodeagent.lifecycle.inventory import Inventory
from nodeagent.lifecycle.usage.disk import Disks, DiskUsage
from nodeagent.net.network import InterfaceStats, Network
from nodeagent.records import Container, Sandbox
from nodeagent.tasks import Tasks, all_of

RATE_SECONDS = 1.0
LOG_PATIENCE_SECONDS = 1.0
READ_AT_ONCE = 50  # of a cgroup costs 0.1 ms, and requests wait for the loop


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupUsage:
    """The usage of a cgroup.

    usage_nano_cores: over the time since an earlier reading at least RATE_SECONDS ago; None before there is one.
    """

    cgroup: CgroupStats
    usage_nano_cores: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerUsage(GroupUsage):
    container: Container
    at_ns: int
    disk: DiskUsage


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxUsage:
    """The usage of a pod. interfaces: empty on the node's network.

    group: the cgroup above its containers, which still counts what ended ones have used; None where there is none, or
    where it has other pods as well.
    """

    sandbox: Sandbox
    group: GroupUsage | None
    containers: tuple[ContainerUsage, ...]
    interfaces: tuple[InterfaceStats, ...]
    at_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LogUsage:
    """The state of a container's log: lines that the disk had no room for, and how long the container had to wait."""

    sandbox: Sandbox
    container: Container
    dropped_lines: int
    held_back_ms: int


@dataclass(slots=True)
class _Rate:
    """The last reading that rates are computed from, at a time of `time.monotonic_ns`, and the last rate."""

    at_ns: int
    usage_ns: int
    nano_cores: int | None = None


class Stats:
    """Readings on request; nothing is sampled in between."""

    def __init__(
        self,
        inventory: Inventory,
        containers: Containers,
        groups: Groups,
        network: Network,
        directory: Path,
        tasks: Tasks,
    ) -> None:
        self._inventory = inventory
        self._containers = containers
        self._groups = groups
        self._network = network
        self._rates: dict[str, _Rate] = {}
        self._disks = Disks(directory, tasks)

    async def container(self, name: str) -> ContainerUsage:
        """The usage of a container. Raises NotFound, also for one that has ended: its cgroup is gone."""
        return await self._read(self._inventory.container(name))

    async def containers(self) -> list[ContainerUsage]:
        """The usage of every running container."""
        return await self._read_all(self._inventory.visible_containers())

    async def sandbox(self, name: str) -> SandboxUsage:
        sandbox = self._inventory.sandbox(name)
        return await self._pod(sandbox, self._network.all_interface_stats(), self._tenants())

    async def sandboxes(self) -> list[SandboxUsage]:
        """The usage of every READY pod."""
        interfaces, tenants = self._network.all_interface_stats(), self._tenants()
        found = []
        for sandbox in self._ready():
            found.append(await self._pod(sandbox, interfaces, tenants))
            await asyncio.sleep(0)
        return found

    async def logs(self) -> list[LogUsage]:
        """The logs of the containers of every READY pod; one whose supervisor does not answer is left out."""
        pods = await all_of(map(self._logs, self._ready()))
        return [log for logs in pods for log in logs]

    async def log(self, container: Container) -> LogUsage | None:
        """The log of one container; None where its supervisor is gone, or does not answer."""
        sandbox = self._inventory.sandboxes.get(container.sandbox_id)
        logs = await self._logs(sandbox) if sandbox else []
        return next((log for log in logs if log.container.id == container.id), None)

    async def _logs(self, sandbox: Sandbox) -> list[LogUsage]:
        pod = self._inventory.pods.get(sandbox.id)
        if pod is None or pod.supervisor is None:
            return []
        try:
            async with asyncio.timeout(LOG_PATIENCE_SECONDS):
                states = await pod.supervisor.state()
        except (NodeAgentError, TimeoutError):
            return []
        return [
            LogUsage(
                sandbox=sandbox,
                container=container,
                dropped_lines=state.dropped_log_lines,
                held_back_ms=state.held_back_ms,
            )
            for state in states
            if (container := self._inventory.containers.get(state.id)) is not None
        ]

    def _ready(self) -> list[Sandbox]:
        return [s for s in self._inventory.visible_sandboxes() if s.ready]

    def _tenants(self) -> Counter[str]:
        """The number of READY pods that have each cgroup for their containers."""
        return Counter(sandbox.cgroup_parent for sandbox in self._ready())

    async def _pod(
        self, sandbox: Sandbox, interfaces: dict[str, InterfaceStats], tenants: Counter[str]
    ) -> SandboxUsage:
        own = interfaces.get(sandbox.id)
        containers = tuple(await self._read_all(self._containers.of(sandbox.id)))
        return SandboxUsage(
            sandbox=sandbox,
            group=self._group(sandbox) if tenants[sandbox.cgroup_parent] == 1 else None,
            containers=containers,
            interfaces=(own,) if own else (),
            at_ns=time.time_ns(),
        )

    def _group(self, sandbox: Sandbox) -> GroupUsage | None:
        try:
            cgroup = self._groups.pod_stats(sandbox)
        except NotFound:
            return None
        return GroupUsage(cgroup=cgroup, usage_nano_cores=self._rate(sandbox.id, cgroup))

    async def _read_all(self, containers: Iterable[Container]) -> list[ContainerUsage]:
        found = []
        for number, container in enumerate(containers, start=1):
            if number % READ_AT_ONCE == 0:
                await asyncio.sleep(0)
            if container.state == "running":
                try:
                    found.append(await self._read(container))
                except NotFound:
                    continue
        return found

    async def _read(self, container: Container) -> ContainerUsage:
        if container.state == "exited":
            raise NotFound(f'container "{container.id}": has ended, there is nothing to measure')
        cgroup = self._groups.of(container).stats()
        return ContainerUsage(
            container=container,
            cgroup=cgroup,
            at_ns=cgroup.at_ns,
            usage_nano_cores=self._rate(container.id, cgroup),
            disk=await self._disks.usage(container.id),
        )

    def _rate(self, object_id: str, cgroup: CgroupStats) -> int | None:
        if cgroup.cpu is None:
            return None
        at_ns, usage_ns = time.monotonic_ns(), cgroup.cpu.usage_ns
        last = self._rates.get(object_id)
        if last is None:
            self._drop_stale()
            self._rates[object_id] = _Rate(at_ns, usage_ns)
            return None
        elapsed = at_ns - last.at_ns
        if elapsed >= RATE_SECONDS * 1e9:
            last.nano_cores = max(0, usage_ns - last.usage_ns) * 10**9 // elapsed
            last.at_ns, last.usage_ns = at_ns, usage_ns
        return last.nano_cores

    def _drop_stale(self) -> None:
        known = self._inventory.containers.keys() | self._inventory.sandboxes.keys()
        for object_id in self._rates.keys() - known:
            del self._rates[object_id]
        self._disks.keep(known)
