"""The metrics of the CRI as plain values: their descriptors, and the values of every pod.

The kubelet drops a metric without descriptor and expects a value for each descriptor, so a value that the kernel does
not account is 0 here.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from nodeagent.errors import NotFound
from nodeagent.lifecycle.node import Node
from nodeagent.lifecycle.usage.stats import ContainerUsage, SandboxUsage
from nodeagent.metrics.families import ACCOUNTED, NETWORK, Family, Kind, T
from nodeagent.metrics.inspection import INSPECTED, Inspected, inspect
from nodeagent.records import Sandbox

BASE_LABELS = ("pod", "namespace", "container", "id", "image")


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    name: str
    help: str
    label_keys: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One value of a metric. label_values: in the order of the descriptor's keys."""

    name: str
    kind: Kind
    label_values: tuple[str, ...]
    value: float
    at_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PodMetrics:
    """The metrics of one pod: those of its network, and those of its containers by id."""

    sandbox_id: str
    metrics: list[Metric]
    containers: dict[str, list[Metric]]


DESCRIPTORS: tuple[Descriptor, ...] = tuple(
    Descriptor(name=f.name, help=f.help, label_keys=(*BASE_LABELS, *f.labels))
    for families in (ACCOUNTED, INSPECTED, NETWORK)
    for f in families
)


async def read_pods(node: Node) -> list[PodMetrics]:
    """Read the metrics of every READY pod."""
    pods = await node.stats.sandboxes()
    running = [(usage, _pids(node, usage)) for pod in pods for usage in pod.containers]
    inspected = await asyncio.to_thread(_inspect_all, running)
    return [_pod(pod, inspected) for pod in pods]


def _pids(node: Node, usage: ContainerUsage) -> list[int]:
    with suppress(NotFound, OSError):
        return node.groups.of(usage.container).processes()
    return []


def _inspect_all(running: Sequence[tuple[ContainerUsage, list[int]]]) -> dict[str, Inspected]:
    found = {}
    for usage, pids in running:
        with suppress(OSError):
            found[usage.container.id] = inspect(usage, pids)
    return found


def _pod(pod: SandboxUsage, inspected: dict[str, Inspected]) -> PodMetrics:
    sandbox = pod.sandbox
    base = _base(sandbox, "", sandbox.id, "")
    return PodMetrics(
        sandbox_id=sandbox.id,
        metrics=[
            metric
            for interface in pod.interfaces
            for metric in _metrics(NETWORK, interface, base, pod.at_ns)
        ],
        containers={
            usage.container.id: _container(sandbox, usage, inspected.get(usage.container.id))
            for usage in pod.containers
        },
    )


def _container(
    sandbox: Sandbox, usage: ContainerUsage, inspected: Inspected | None
) -> list[Metric]:
    container = usage.container
    base = _base(sandbox, container.config.name, container.id, container.image_name)
    found = list(_metrics(ACCOUNTED, usage, base, usage.at_ns))
    if inspected is not None:
        found += _metrics(INSPECTED, inspected, base, usage.at_ns)
    return found


def _base(sandbox: Sandbox, container: str, object_id: str, image: str) -> tuple[str, ...]:
    return sandbox.config.name, sandbox.config.namespace, container, object_id, image


def _metrics(
    families: Sequence[Family[T]], thing: T, base: tuple[str, ...], at_ns: int
) -> Iterator[Metric]:
    for family in families:
        nothing = ((("",) * len(family.labels), 0.0),)
        for labels, value in tuple(family.read(thing)) or nothing:
            yield Metric(
                name=family.name,
                kind=family.kind,
                label_values=(*base, *labels),
                value=value,
                at_ns=at_ns,
            )
