"""Metrics that need an inspection of a container's processes, its file system or its limits.

That is too expensive for each scrape: the CRI's metrics have them, the Prometheus endpoint does not. Inspecting blocks:
it is for threads.
"""

import os
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from nodeagent.lifecycle.usage.stats import ContainerUsage
from nodeagent.metrics.families import NANO, Family, Kind, Sample, device_name
from nodeagent.requests import Resources

DEFAULT_PERIOD_USEC = (
    100_000  # of the CPU limit: the kernel's default (kernel/sched/fair.c, default_cfs_period)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filesystem:
    """The file system that a writable layer is on."""

    device: str
    size_bytes: int
    inodes: int
    inodes_free: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspected:
    """A running container. open_files_limit: the soft limit of its first process, None if that has ended."""

    usage: ContainerUsage
    processes: int
    file_descriptors: int
    sockets: int
    open_files_limit: int | None
    filesystem: Filesystem


# --- inspecting -----------------------------------------------------------------------------------------------------


def inspect(usage: ContainerUsage, pids: Sequence[int]) -> Inspected:
    """Inspect a container by the pids of its processes; those that end meanwhile are not counted."""
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
    """How many descriptors a process has open, and how many of them are sockets."""
    total = sockets = 0
    with os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            # proc_pid_fd(5): a socket's link reads socket:[inode]. Reading it opens nothing, as open(2) would.
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
    _value(
        "memory_failcnt", "Number of times that the memory limit was hit", _limit_hits, "counter"
    ),
    _value("last_seen", "Time of the measurement, Unix time", lambda i: i.usage.at_ns * NANO),
    _filesystem(
        "usage_bytes", "Size of the writable layer", lambda i: i.usage.disk.used_bytes or 0
    ),
    _filesystem(
        "limit_bytes", "Size of the writable layer's file system", lambda i: i.filesystem.size_bytes
    ),
    _filesystem(
        "inodes_total", "Inodes of the writable layer's file system", lambda i: i.filesystem.inodes
    ),
    _filesystem(
        "inodes_free",
        "Free inodes of the writable layer's file system",
        lambda i: i.filesystem.inodes_free,
    ),
    _limit(
        "cpu_period",
        "Period of the CPU limit in microseconds",
        lambda limits: limits.cpu_period_usec or DEFAULT_PERIOD_USEC,
    ),
    _limit(
        "cpu_quota",
        "CPU time allowed in a period, in microseconds",
        lambda limits: limits.cpu_quota_usec,
    ),
    _limit(
        "cpu_shares",
        "Weight of the container's CPU time against that of others, as in cpu.shares",
        lambda limits: limits.cpu_shares,
    ),
    _limit("memory_limit_bytes", "Memory limit", lambda limits: limits.memory_limit_bytes),
    _limit(
        "memory_reservation_limit_bytes",
        "Memory above which the container is throttled (memory.high)",
        _memory_high,
    ),
    _limit(
        "memory_swap_limit_bytes",
        "Limit of memory and swap together",
        lambda limits: limits.memory_swap_limit_bytes,
    ),
)
