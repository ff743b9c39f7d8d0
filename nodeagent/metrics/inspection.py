"""What only a look at a container's processes, its file system or its limits tells, and the metrics made of it.

Too dear for every scrape: the CRI's metrics have it, the Prometheus endpoint has not. Looking blocks: for threads.
"""

import os
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from nodeagent.lifecycle.usage.stats import ContainerUsage
from nodeagent.metrics.families import NANO, Family, Kind, Sample, device_name
from nodeagent.records import Resources

DEFAULT_PERIOD_USEC = 100_000  # of the CPU limit, where none was asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Filesystem:
    """The one that a writable layer is on."""

    device: str
    size_bytes: int
    inodes: int
    inodes_free: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspected:
    """A running container. open_files_limit: the soft one of its first process, None if that is gone."""

    usage: ContainerUsage
    processes: int
    file_descriptors: int
    sockets: int
    open_files_limit: int | None
    filesystem: Filesystem


# --- looking --------------------------------------------------------------------------------------------------------


def inspect(usage: ContainerUsage, pids: Sequence[int]) -> Inspected:
    """pids: of the container's processes. What ends meanwhile is not counted."""
    descriptors = sockets = 0
    for pid in pids:
        with suppress(OSError):
            found, among = _descriptors(pid)
            descriptors += found
            sockets += among
    return Inspected(
        usage=usage,
        processes=len(pids),
        file_descriptors=descriptors,
        sockets=sockets,
        open_files_limit=_open_files_limit(usage.container.pid),
        filesystem=filesystem(usage.disk.mountpoint),
    )


def _descriptors(pid: int) -> tuple[int, int]:
    """How many a process has open, and how many of them are sockets."""
    total = sockets = 0
    with os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            total += 1
            with suppress(OSError):
                sockets += os.readlink(entry.path).startswith("socket:")
    return total, sockets


def _open_files_limit(pid: int) -> int | None:
    try:
        soft, _ = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    except OSError:
        return None
    return soft


def filesystem(directory: str) -> Filesystem:
    space = os.statvfs(directory)
    number = os.stat(directory).st_dev
    return Filesystem(
        device=device_name(os.major(number), os.minor(number)),
        size_bytes=space.f_blocks * space.f_frsize,
        inodes=space.f_files,
        inodes_free=space.f_ffree,
    )


# --- metrics --------------------------------------------------------------------------------------------------------


def _value(
    name: str, help_: str, read: Callable[[Inspected], float], kind: Kind = "gauge"
) -> Family[Inspected]:
    def samples(inspected: Inspected) -> Iterator[Sample]:
        yield (), read(inspected)

    return Family(f"container_{name}", kind, help_, samples)


def _filesystem(name: str, help_: str, read: Callable[[Inspected], float]) -> Family[Inspected]:
    def samples(inspected: Inspected) -> Iterator[Sample]:
        yield (inspected.filesystem.device,), read(inspected)

    return Family(f"container_fs_{name}", "gauge", help_, samples, ("device",))


def _limit(name: str, help_: str, read: Callable[[Resources], int]) -> Family[Inspected]:
    def samples(inspected: Inspected) -> Iterator[Sample]:
        yield (), max(0, read(inspected.usage.container.resources))

    return Family(f"container_spec_{name}", "gauge", f"{help_}; 0 is none", samples)


def _open_files(inspected: Inspected) -> Iterator[Sample]:
    if (limit := inspected.open_files_limit) is not None:
        yield ("max_open_files",), max(0, limit)


def _limit_hits(inspected: Inspected) -> float:
    memory = inspected.usage.cgroup.memory
    return memory.failures if memory else 0


def _memory_high(limits: Resources) -> int:
    text = limits.unified.get("memory.high", "")
    return int(text) if text.isdecimal() else 0


INSPECTED: tuple[Family[Inspected], ...] = (
    _value("processes", "Processes", lambda i: i.processes),
    _value("file_descriptors", "Open files of all processes", lambda i: i.file_descriptors),
    _value("sockets", "Open sockets of all processes", lambda i: i.sockets),
    Family(
        "container_ulimits_soft",
        "gauge",
        "Soft limits of the first process; 0 is none",
        _open_files,
        ("ulimit",),
    ),
    _value("memory_failcnt", "How often the memory limit was hit", _limit_hits, "counter"),
    _value("last_seen", "When this was measured, Unix time", lambda i: i.usage.at_ns * NANO),
    _filesystem(
        "usage_bytes", "Size of the writable layer", lambda i: i.usage.disk.used_bytes or 0
    ),
    _filesystem("limit_bytes", "Size of its file system", lambda i: i.filesystem.size_bytes),
    _filesystem("inodes_total", "Inodes of its file system", lambda i: i.filesystem.inodes),
    _filesystem("inodes_free", "Free inodes there", lambda i: i.filesystem.inodes_free),
    _limit(
        "cpu_period",
        "Microseconds of a period of the CPU limit",
        lambda limits: limits.cpu_period_usec or DEFAULT_PERIOD_USEC,
    ),
    _limit("cpu_quota", "Microseconds of CPU in a period", lambda limits: limits.cpu_quota_usec),
    _limit("cpu_shares", "Share of the CPU among others", lambda limits: limits.cpu_shares),
    _limit("memory_limit_bytes", "Memory limit", lambda limits: limits.memory_limit_bytes),
    _limit("memory_reservation_limit_bytes", "Memory that is throttled above it", _memory_high),
    _limit(
        "memory_swap_limit_bytes",
        "Limit of memory and swap together",
        lambda limits: limits.memory_swap_limit_bytes,
    ),
)
