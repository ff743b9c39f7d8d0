"""A node in memory: it keeps records as the lifecycle does and runs nothing."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import msgspec

from nodeagent import records as transitions
from nodeagent.api import runtime_pb2_grpc as rpc
from nodeagent.cgroups.parse import Pressure, PressureLine
from nodeagent.cgroups.stats import (
    CgroupStats,
    CpuStats,
    HugetlbStats,
    IoStats,
    MemoryStats,
    PidsStats,
    PressureStats,
)
from nodeagent.config import Config
from nodeagent.cri.server import MAX_MESSAGE_BYTES, Server
from nodeagent.errors import FailedPrecondition, NotFound
from nodeagent.images.usage import Counters
from nodeagent.lifecycle.containers.exec_sync import ExecResult
from nodeagent.lifecycle.events import Events
from nodeagent.lifecycle.node import Node, NodeStatus
from nodeagent.lifecycle.usage.disk import DiskUsage
from nodeagent.lifecycle.usage.stats import ContainerUsage, LogUsage, SandboxUsage
from nodeagent.net.stats import InterfaceStats
from nodeagent.records import Container, Image, Sandbox, StoredProfile
from nodeagent.requests import ContainerConfig, Resources, SandboxConfig
from nodeagent.tasks import Tasks
from tests.unit.cri import records

SECOND = 10**9
RECEIVE = (("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),)


class FakeSandboxes:
    def __init__(self) -> None:
        self.records: dict[str, Sandbox] = {}
        self.updates: list[tuple[str, Resources | None, Resources | None]] = []
        self.hold: asyncio.Event | None = None
        self.error: Exception | None = None
        self.handlers: list[str] = []
        self.not_answering: dict[str, str] = {}

    def get(self, name: str) -> Sandbox:
        found = [record for key, record in self.records.items() if name and key.startswith(name)]
        if not found:
            raise NotFound(f'pod sandbox "{name}": not found')
        return found[0]

    def list(self) -> list[Sandbox]:
        return list(self.records.values())

    def verbose(self, name: str) -> dict[str, Any]:
        return {"pid": 77, "name": self.get(name).config.name}

    async def run(self, config: SandboxConfig, runtime_handler: str) -> str:
        if self.hold is not None:
            await self.hold.wait()
        if self.error is not None:
            raise self.error
        sandbox_id = f"{len(self.records):064x}"
        self.handlers.append(runtime_handler)
        self.records[sandbox_id] = msgspec.structs.replace(
            records.sandbox(sandbox_id, addresses=("10.0.0.2",)),
            config=config,
            runtime_handler=runtime_handler,
        )
        return sandbox_id

    async def stop(self, name: str) -> None:
        if name in self.records:
            self.records[name] = msgspec.structs.replace(self.records[name], stopped_at=99)

    async def remove(self, name: str) -> None:
        self.records.pop(name, None)

    async def update_resources(
        self, name: str, overhead: Resources | None, resources: Resources | None
    ) -> None:
        self.updates.append((self.get(name).id, overhead, resources))


class FakeContainers:
    def __init__(self) -> None:
        self.records: dict[str, Container] = {}
        self.reopened: list[str] = []
        self.commands: list[tuple[str, tuple[str, ...], float]] = []
        self.result: ExecResult | Exception = ExecResult(stdout=b"out", stderr=b"err", exit_code=3)

    def get(self, name: str) -> Container:
        if name not in self.records:
            raise NotFound(f'container "{name}": not found')
        return self.records[name]

    def of(self, sandbox_id: str) -> list[Container]:
        return [record for record in self.records.values() if record.sandbox_id == sandbox_id]

    def list(self) -> list[Container]:
        return list(self.records.values())

    def verbose(self, name: str) -> dict[str, Any]:
        return {"argv": list(self.get(name).config.command)}

    async def create(self, sandbox_id: str, config: ContainerConfig) -> str:
        container_id = f"{0xC000 + len(self.records):064x}"
        self.records[container_id] = msgspec.structs.replace(
            records.container(container_id, sandbox_id=sandbox_id),
            config=config,
            resources=config.resources,
        )
        return container_id

    async def start(self, name: str) -> None:
        self.records[name] = transitions.started(self.get(name), 40)

    async def stop(self, name: str, timeout_s: float) -> None:
        if name in self.records:
            self.records[name] = transitions.exited(self.records[name], 143, 50, oom=False)

    async def remove(self, name: str) -> None:
        self.records.pop(name, None)

    async def update(self, name: str, resources: Resources) -> None:
        self.records[name] = msgspec.structs.replace(self.get(name), resources=resources)

    async def exec_sync(self, name: str, argv: tuple[str, ...], timeout_s: float) -> ExecResult:
        self.commands.append((self.get(name).id, argv, timeout_s))
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    async def reopen_log(self, name: str) -> None:
        if self.get(name).state != "running":
            raise FailedPrecondition(f'container "{name}": not running')
        self.reopened.append(name)


class FakeImages:
    def __init__(self) -> None:
        self.records: dict[str, Image] = {}
        self.counters = Counters()
        self.pulls: list[tuple[str, Any]] = []
        self.error: Exception | None = None

    def find(self, name: str) -> Image | None:
        return next((i for i in self.records.values() if name == i.id or name in i.repo_tags), None)

    def list(self) -> list[Image]:
        return list(self.records.values())

    async def pull(self, reference: str, auth: Any) -> Image:
        self.pulls.append((reference, auth))
        if self.error is not None:
            raise self.error
        image = records.image("sha256:pulled", repo_tags=(reference,))
        self.records[image.id] = image
        return image

    async def remove(self, name: str) -> None:
        if image := self.find(name):
            del self.records[image.id]

    async def usage(self) -> Any:
        return SimpleNamespace(mountpoint=Path("/var/lib/x"), used_bytes=4096, inodes_used=7)


class FakeArtifacts:
    def __init__(self) -> None:
        self.records: dict[str, StoredProfile] = {}
        self.pulls: list[tuple[str, Any]] = []

    def list(self) -> list[StoredProfile]:
        return list(self.records.values())

    async def pull(self, reference: str, auth: Any) -> bool:
        self.pulls.append((reference, auth))
        digest = reference.partition("@")[2]
        cached = digest in self.records
        self.records[digest] = StoredProfile(
            digest=digest, content="sha256:c", refs=(reference,), size_bytes=9, pulled_at=1
        )
        return cached

    async def remove(self, digest: str) -> None:
        self.records.pop(digest, None)


class FakeStats:
    def __init__(self, node: "FakeNode") -> None:
        self._node = node
        self.cgroup = full_cgroup()

    async def container(self, name: str) -> ContainerUsage:
        return self._usage(self._node.containers.get(name))

    async def containers(self) -> list[ContainerUsage]:
        running = [c for c in self._node.containers.list() if c.state == "running"]
        return [self._usage(container) for container in running]

    async def sandbox(self, name: str) -> SandboxUsage:
        sandbox = self._node.sandboxes.get(name)
        return SandboxUsage(
            sandbox=sandbox,
            group=None,
            containers=tuple(map(self._usage, self._node.containers.of(sandbox.id))),
            interfaces=(interface(),) if sandbox.config.namespaces.network == "pod" else (),
            at_ns=9 * SECOND,
        )

    async def sandboxes(self) -> list[SandboxUsage]:
        return [await self.sandbox(sandbox.id) for sandbox in self._node.sandboxes.list()]

    async def logs(self) -> list[LogUsage]:
        return [
            LogUsage(sandbox=sandbox, container=container, dropped_lines=3, held_back_ms=1500)
            for sandbox in self._node.sandboxes.list()
            for container in self._node.containers.of(sandbox.id)
        ]

    async def log(self, container: Container) -> LogUsage | None:
        return next((log for log in await self.logs() if log.container is container), None)

    def _usage(self, container: Container) -> ContainerUsage:
        return ContainerUsage(
            container=container,
            cgroup=self.cgroup,
            at_ns=8 * SECOND,
            usage_nano_cores=250_000_000,
            disk=DiskUsage(mountpoint="/", used_bytes=8192, inodes_used=4, at_ns=7 * SECOND),
        )


def interface() -> InterfaceStats:
    return InterfaceStats(
        name="eth0",
        rx_bytes=1,
        rx_packets=2,
        rx_errors=3,
        rx_dropped=4,
        tx_bytes=5,
        tx_packets=6,
        tx_errors=7,
        tx_dropped=8,
    )


def full_cgroup() -> CgroupStats:
    """Every part of it; no two numbers are the same."""
    line = PressureLine(avg10=1.5, avg60=2.5, avg300=3.5, total_usec=2_500_000)
    pressure = Pressure(some=line, full=line._replace(total_usec=1_500_000))
    return CgroupStats(
        at_ns=8 * SECOND,
        cpu=CpuStats(
            usage_ns=2_500_000_000,
            user_ns=1_500_000_000,
            system_ns=1_000_000_000,
            periods=11,
            throttled_periods=5,
            throttled_ns=500_000_000,
        ),
        memory=MemoryStats(
            usage_bytes=1000,
            limit_bytes=5000,
            max_usage_bytes=1200,
            rss_bytes=300,
            cache_bytes=600,
            mapped_file_bytes=50,
            active_file_bytes=400,
            inactive_file_bytes=200,
            kernel_bytes=70,
            swap_bytes=90,
            swap_limit_bytes=190,
            page_faults=21,
            major_page_faults=22,
            failures=23,
            oom_kills=24,
        ),
        pids=PidsStats(current=6, limit=None),
        io=(IoStats(device=(8, 0), read_bytes=31, written_bytes=32, reads=33, writes=34),),
        hugetlb=(HugetlbStats(page_size="2MB", usage_bytes=41, max_usage_bytes=42),),
        pressure=PressureStats(cpu=pressure, memory=pressure, io=pressure),
    )


class FakeNode:
    def __init__(self) -> None:
        self.config = Config(handlers=("kata",))
        self.version = "0.1.0"
        self.sandboxes = FakeSandboxes()
        self.containers = self.creation = self.stopping = FakeContainers()
        self.groups = SimpleNamespace(of=lambda _: SimpleNamespace(processes=lambda: [1]))
        self.images = FakeImages()
        self.artifacts = FakeArtifacts()
        self.stats = FakeStats(self)
        self.events = Events()
        self.slots = SimpleNamespace(ready=3)
        self.tasks = Tasks()
        self.cgroups = SimpleNamespace(driver="cgroupfs")
        self.pod_cidrs: list[str] = []
        self.network = SimpleNamespace(set_pod_cidr=self._set_pod_cidr)
        self.reconciliation = SimpleNamespace(leaks={"pod": 0, "hold": 2})
        self.condition = NodeStatus(
            runtime_ready=True,
            runtime_reason="",
            runtime_message="",
            network_ready=False,
            network_reason="BridgeMissing",
            network_message="na0: no such link",
            network_problems=("no masquerade: nf_tables",),
            not_answering={"a": "process 7 does not answer"},
        )

    async def status(self) -> NodeStatus:
        return self.condition

    async def _set_pod_cidr(self, cidr: str) -> None:
        self.pod_cidrs.append(cidr)

    @property
    def node(self) -> Node:
        return cast(Node, self)


async def until(condition: Callable[[], object]) -> None:
    """Return once it holds; what holds it up is another task of this loop."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110, nobody else tells
            await asyncio.sleep(0.005)


class Client:
    """A served node, as a client sees it."""

    def __init__(
        self, node: FakeNode, channel: grpc.aio.Channel, observed: list[tuple[str, str]]
    ) -> None:
        self.node = node
        self.channel = channel
        self.runtime: Any = rpc.RuntimeServiceStub(channel)
        self.images: Any = rpc.ImageServiceStub(channel)
        self.observed = observed


@asynccontextmanager
async def serving(path: Path, **options: Any) -> AsyncIterator[Client]:
    node = FakeNode()
    observed: list[tuple[str, str]] = []

    def observe(method: str, code: str, seconds: float) -> None:
        assert seconds >= 0
        observed.append((method, code))

    listen = f"unix://{path}"
    async with (
        Server.open(node.node, listen, observe=observe, **options),
        grpc.aio.insecure_channel(listen, options=RECEIVE) as channel,
    ):
        yield Client(node, channel, observed)
