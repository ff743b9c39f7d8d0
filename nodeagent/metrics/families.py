"""Metrics of containers and pods: each one's name, meaning and labels, and how it is read.

One table serves both outputs: the Prometheus endpoint gives the values as they are, the CRI the whole number, and the
value with its fraction in double_value. The names are cAdvisor's, which dashboards know, and end in the unit. What the
kernel does not account has no value.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, Literal, TypeVar

from nodeagent.cgroups.parse import Pressure
from nodeagent.cgroups.stats import CpuStats, HugetlbStats, IoStats, MemoryStats, PressureStats
from nodeagent.lifecycle.usage.stats import ContainerUsage
from nodeagent.net.stats import InterfaceStats

Kind = Literal["counter", "gauge"]
Sample = tuple[tuple[str, ...], float]
"""The values of the family's own labels, and the number."""

T = TypeVar("T")

NANO, MICRO = 1e-9, 1e-6


@dataclass(frozen=True, slots=True)
class Family(Generic[T]):
    """A metric of objects of type T. labels: beyond those that name the object."""

    name: str
    kind: Kind
    help: str
    read: Callable[[T], Iterator[Sample]]
    labels: tuple[str, ...] = ()


# --- from a container's cgroup --------------------------------------------------------------------------------------


def _cpu(name: str, help_: str, read: Callable[[CpuStats], float]) -> Family[ContainerUsage]:
    def samples(usage: ContainerUsage) -> Iterator[Sample]:
        if usage.cgroup.cpu:
            yield (), read(usage.cgroup.cpu)

    return Family(f"container_cpu_{name}", "counter", help_, samples)


def _cpu_usage(usage: ContainerUsage) -> Iterator[Sample]:
    if usage.cgroup.cpu:
        yield ("total",), usage.cgroup.cpu.usage_ns * NANO


def _memory(
    name: str, kind: Kind, help_: str, read: Callable[[MemoryStats], float]
) -> Family[ContainerUsage]:
    def samples(usage: ContainerUsage) -> Iterator[Sample]:
        if usage.cgroup.memory:
            yield (), read(usage.cgroup.memory)

    return Family(f"container_{name}", kind, help_, samples)


def _memory_failures(usage: ContainerUsage) -> Iterator[Sample]:
    """Page faults by type, with one value for both scopes: below a container are only the groups of its execs."""
    if memory := usage.cgroup.memory:
        for scope in ("container", "hierarchy"):
            yield ("pgfault", scope), memory.page_faults
            yield ("pgmajfault", scope), memory.major_page_faults


def _io(name: str, help_: str, read: Callable[[IoStats], float]) -> Family[ContainerUsage]:
    def samples(usage: ContainerUsage) -> Iterator[Sample]:
        for io in usage.cgroup.io:
            yield (device_name(*io.device),), read(io)

    return Family(f"container_fs_{name}", "counter", help_, samples, ("device",))


def _blkio(usage: ContainerUsage) -> Iterator[Sample]:
    for io in usage.cgroup.io:
        device = (device_name(*io.device), *map(str, io.device))
        yield (*device, "Read"), io.read_bytes
        yield (*device, "Write"), io.written_bytes


@lru_cache(maxsize=1024)
def device_name(major: int, minor: int) -> str:
    """The name of a block device, like ``/dev/sda``; its numbers where it has no node."""
    with (
        suppress(OSError),
        open(f"/sys/dev/block/{major}:{minor}/uevent", encoding="ascii") as uevent,
    ):
        for line in uevent:
            if line.startswith("DEVNAME="):
                return "/dev/" + line.strip().removeprefix("DEVNAME=")
    return f"{major}:{minor}"


def _hugetlb(
    name: str, help_: str, read: Callable[[HugetlbStats], float]
) -> Family[ContainerUsage]:
    def samples(usage: ContainerUsage) -> Iterator[Sample]:
        for pages in usage.cgroup.hugetlb:
            yield (pages.page_size,), read(pages)

    return Family(f"container_hugetlb_{name}", "gauge", help_, samples, ("pagesize",))


def _pressure(
    resource: str, of: Callable[[PressureStats], Pressure | None]
) -> tuple[Family[ContainerUsage], Family[ContainerUsage]]:
    def waiting(usage: ContainerUsage) -> Iterator[Sample]:
        if pressure := of(usage.cgroup.pressure):
            yield (), pressure.some.total_usec * MICRO

    def stalled(usage: ContainerUsage) -> Iterator[Sample]:
        if pressure := of(usage.cgroup.pressure):
            yield (), pressure.full.total_usec * MICRO

    name, time_of = (
        f"container_pressure_{resource}",
        f"Time in which {{}} tasks waited for {resource}",
    )
    return (
        Family(f"{name}_waiting_seconds_total", "counter", time_of.format("some"), waiting),
        Family(f"{name}_stalled_seconds_total", "counter", time_of.format("all"), stalled),
    )


def _threads(usage: ContainerUsage) -> Iterator[Sample]:
    if usage.cgroup.pids:
        yield (), usage.cgroup.pids.current


def _threads_max(usage: ContainerUsage) -> Iterator[Sample]:
    if usage.cgroup.pids:
        yield (), usage.cgroup.pids.limit or 0


def _start_time(usage: ContainerUsage) -> Iterator[Sample]:
    yield (), usage.container.started_at * NANO


ACCOUNTED: tuple[Family[ContainerUsage], ...] = (
    Family("container_cpu_usage_seconds_total", "counter", "CPU time used", _cpu_usage, ("cpu",)),
    _cpu("user_seconds_total", "CPU time in user mode", lambda cpu: cpu.user_ns * NANO),
    _cpu("system_seconds_total", "CPU time in the kernel", lambda cpu: cpu.system_ns * NANO),
    _cpu("cfs_periods_total", "Elapsed periods of the CPU limit", lambda cpu: cpu.periods),
    _cpu(
        "cfs_throttled_periods_total",
        "Periods in which the CPU limit was hit",
        lambda cpu: cpu.throttled_periods,
    ),
    _cpu(
        "cfs_throttled_seconds_total",
        "Time throttled by the CPU limit",
        lambda cpu: cpu.throttled_ns * NANO,
    ),
    _memory(
        "memory_usage_bytes",
        "gauge",
        "All memory, page cache included",
        lambda memory: memory.usage_bytes,
    ),
    _memory(
        "memory_working_set_bytes",
        "gauge",
        "Memory without inactive file cache",
        lambda memory: memory.working_set_bytes,
    ),
    _memory("memory_rss", "gauge", "Bytes of anonymous memory", lambda memory: memory.rss_bytes),
    _memory("memory_cache", "gauge", "Bytes of page cache", lambda memory: memory.cache_bytes),
    _memory(
        "memory_mapped_file",
        "gauge",
        "Bytes of mapped files",
        lambda memory: memory.mapped_file_bytes,
    ),
    _memory(
        "memory_total_active_file_bytes",
        "gauge",
        "Page cache that was used recently",
        lambda memory: memory.active_file_bytes,
    ),
    _memory(
        "memory_total_inactive_file_bytes",
        "gauge",
        "Page cache that is reclaimed first",
        lambda memory: memory.inactive_file_bytes,
    ),
    _memory("memory_swap", "gauge", "Bytes in swap", lambda memory: memory.swap_bytes),
    _memory(
        "memory_max_usage_bytes",
        "gauge",
        "Highest usage of memory",
        lambda memory: memory.max_usage_bytes,
    ),
    _memory(
        "memory_kernel_usage", "gauge", "Bytes of kernel memory", lambda memory: memory.kernel_bytes
    ),
    Family(
        "container_memory_failures_total",
        "counter",
        "Page faults by type",
        _memory_failures,
        ("failure_type", "scope"),
    ),
    _memory(
        "oom_events_total",
        "counter",
        "Processes that the OOM killer ended",
        lambda memory: memory.oom_kills,
    ),
    _io("reads_bytes_total", "Bytes read", lambda io: io.read_bytes),
    _io("reads_total", "Read operations", lambda io: io.reads),
    _io("writes_bytes_total", "Bytes written", lambda io: io.written_bytes),
    _io("writes_total", "Write operations", lambda io: io.writes),
    Family(
        "container_blkio_device_usage_total",
        "counter",
        "Bytes by device and operation",
        _blkio,
        ("device", "major", "minor", "operation"),
    ),
    _hugetlb("usage_bytes", "Huge pages in use", lambda pages: pages.usage_bytes),
    _hugetlb("max_usage_bytes", "Highest usage of huge pages", lambda pages: pages.max_usage_bytes),
    *_pressure("cpu", lambda pressure: pressure.cpu),
    *_pressure("memory", lambda pressure: pressure.memory),
    *_pressure("io", lambda pressure: pressure.io),
    Family("container_threads", "gauge", "Processes and threads", _threads),
    Family("container_threads_max", "gauge", "Limit of threads; 0 is none", _threads_max),
    Family(
        "container_start_time_seconds", "gauge", "Start of the container, Unix time", _start_time
    ),
)


# --- of a pod's network ---------------------------------------------------------------------------------------------


def _network(
    name: str, help_: str, read: Callable[[InterfaceStats], float]
) -> Family[InterfaceStats]:
    def samples(stats: InterfaceStats) -> Iterator[Sample]:
        yield (stats.name,), read(stats)

    return Family(f"container_network_{name}", "counter", help_, samples, ("interface",))


NETWORK: tuple[Family[InterfaceStats], ...] = (
    _network("receive_bytes_total", "Bytes received", lambda stats: stats.rx_bytes),
    _network("receive_packets_total", "Packets received", lambda stats: stats.rx_packets),
    _network("receive_errors_total", "Errors while receiving", lambda stats: stats.rx_errors),
    _network(
        "receive_packets_dropped_total",
        "Packets dropped while receiving",
        lambda stats: stats.rx_dropped,
    ),
    _network("transmit_bytes_total", "Bytes sent", lambda stats: stats.tx_bytes),
    _network("transmit_packets_total", "Packets sent", lambda stats: stats.tx_packets),
    _network("transmit_errors_total", "Errors while sending", lambda stats: stats.tx_errors),
    _network(
        "transmit_packets_dropped_total",
        "Packets dropped while sending",
        lambda stats: stats.tx_dropped,
    ),
)
