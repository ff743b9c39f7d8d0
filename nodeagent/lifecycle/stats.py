"""What containers and pods use now: cgroup accounting, writable layers, network.

One container whose cgroup vanished is left out; it never fails a list. The size of a writable layer is measured behind
the requests, by a walk in a thread at most every `DISK_SECONDS` while somebody asks.
"""

import asyncio
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from nodeagent.cgroups.stats import CgroupStats
from nodeagent.errors import NotFound
from nodeagent.lifecycle.containers import Containers
from nodeagent.lifecycle.registry import Registry
from nodeagent.net.network import InterfaceStats, Network
from nodeagent.records import Container, Sandbox

DISK_SECONDS = 10.0
RATE_SECONDS = 1.0
READ_AT_ONCE = 50  # of a cgroup costs 0.1 ms, and requests wait for the loop


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskUsage:
    """A writable layer. mountpoint: a directory on its file system."""

    mountpoint: str
    used_bytes: int
    inodes_used: int
    at_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerUsage:
    """usage_nano_cores: over the time since an earlier reading at least RATE_SECONDS ago; None before there is one."""

    container: Container
    cgroup: CgroupStats
    at_ns: int
    usage_nano_cores: int | None
    disk: DiskUsage


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxUsage:
    """interfaces: empty on the node's network."""

    sandbox: Sandbox
    containers: tuple[ContainerUsage, ...]
    interfaces: tuple[InterfaceStats, ...]
    at_ns: int


@dataclass(slots=True)
class _Rate:
    """The last reading that rates are computed from, and the last rate."""

    at_ns: int
    usage_ns: int
    nano_cores: int | None = None


@dataclass(slots=True)
class _Disk:
    usage: DiskUsage
    walk: asyncio.Task[None] | None = field(default=None)


class Stats:
    """Readings on request; nothing is sampled while nobody asks."""

    def __init__(
        self, registry: Registry, containers: Containers, network: Network, directory: Path
    ) -> None:
        self._registry = registry
        self._containers = containers
        self._network = network
        self._directory = directory
        self._rates: dict[str, _Rate] = {}
        self._disks: dict[str, _Disk] = {}

    async def container(self, name: str) -> ContainerUsage:
        """Raises NotFound, also for a container that has ended: its cgroup is gone."""
        return await self._read(self._registry.container(name))

    async def containers(self) -> list[ContainerUsage]:
        """Of every running container."""
        self._drop_stale()
        return await self._read_all(self._registry.visible_containers())

    async def sandbox(self, name: str) -> SandboxUsage:
        sandbox = self._registry.sandbox(name)
        interfaces = self._network.all_interface_stats()
        return await self._pod(sandbox, interfaces)

    async def sandboxes(self) -> list[SandboxUsage]:
        """Of every READY pod."""
        interfaces = self._network.all_interface_stats()
        ready = [s for s in self._registry.visible_sandboxes() if s.ready]
        found = []
        for sandbox in ready:
            found.append(await self._pod(sandbox, interfaces))
            await asyncio.sleep(0)
        return found

    async def _pod(self, sandbox: Sandbox, interfaces: dict[str, InterfaceStats]) -> SandboxUsage:
        own = interfaces.get(sandbox.id)
        return SandboxUsage(
            sandbox=sandbox,
            containers=tuple(await self._read_all(self._containers.of(sandbox.id))),
            interfaces=(own,) if own else (),
            at_ns=time.time_ns(),
        )

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
        cgroup = self._containers.group(container).stats()
        at_ns = time.time_ns()
        return ContainerUsage(
            container=container,
            cgroup=cgroup,
            at_ns=at_ns,
            usage_nano_cores=self._rate(
                container.id, at_ns, cgroup.cpu.usage_ns if cgroup.cpu else 0
            ),
            disk=await self._disk(container.id),
        )

    def _rate(self, container_id: str, at_ns: int, usage_ns: int) -> int | None:
        last = self._rates.get(container_id)
        if last is None:
            self._rates[container_id] = _Rate(at_ns, usage_ns)
            return None
        elapsed = at_ns - last.at_ns
        if elapsed >= RATE_SECONDS * 1e9:
            last.nano_cores = max(0, usage_ns - last.usage_ns) * 10**9 // elapsed
            last.at_ns, last.usage_ns = at_ns, usage_ns
        return last.nano_cores

    async def _disk(self, container_id: str) -> DiskUsage:
        disk = self._disks.get(container_id)
        if disk is None:
            usage = await asyncio.to_thread(measure, self._directory / container_id / "upper")
            disk = self._disks[container_id] = _Disk(usage)
        elif disk.walk is None and time.time_ns() - disk.usage.at_ns > DISK_SECONDS * 1e9:
            disk.walk = asyncio.create_task(self._walk(container_id, disk))
        return disk.usage

    async def _walk(self, container_id: str, disk: _Disk) -> None:
        disk.usage = await asyncio.to_thread(measure, self._directory / container_id / "upper")
        disk.walk = None

    def _drop_stale(self) -> None:
        for table in (self._rates, self._disks):
            for container_id in table.keys() - self._registry.containers.keys():
                del table[container_id]


def measure(directory: Path) -> DiskUsage:
    """Bytes allocated and inodes below a directory, links not followed; what vanishes meanwhile is not counted."""
    used_bytes = inodes = 0
    for _, directories, names, parent in os.fwalk(directory, follow_symlinks=False):
        for name in (*directories, *names):
            with suppress(FileNotFoundError):
                used_bytes += os.stat(name, dir_fd=parent, follow_symlinks=False).st_blocks * 512
                inodes += 1
    return DiskUsage(
        mountpoint=str(directory.parents[1]),
        used_bytes=used_bytes,
        inodes_used=inodes,
        at_ns=time.time_ns(),
    )
