"""The usage of a group: records that both cgroup versions fill. Times and counts begin when the group was made."""

from dataclasses import dataclass

from nodeagent.cgroups.parse import Pressure


@dataclass(frozen=True, slots=True)
class CpuStats:
    """CPU time, and the periods of the bandwidth limit: how many were throttled, and for how long in all."""

    usage_ns: int
    user_ns: int
    system_ns: int
    periods: int
    throttled_periods: int
    throttled_ns: int


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """Memory and swap; `limit_bytes` and `swap_limit_bytes` are None without a limit.

    failures: how often the limit was hit. oom_kills: processes of this very group that the OOM killer killed.
    """

    usage_bytes: int
    limit_bytes: int | None
    max_usage_bytes: int
    rss_bytes: int
    cache_bytes: int
    mapped_file_bytes: int
    active_file_bytes: int
    inactive_file_bytes: int
    kernel_bytes: int
    swap_bytes: int
    swap_limit_bytes: int | None
    page_faults: int
    major_page_faults: int
    failures: int
    oom_kills: int

    @property
    def working_set_bytes(self) -> int:
        """Usage without inactive page cache, as the kubelet's eviction defines it."""
        return max(0, self.usage_bytes - self.inactive_file_bytes)

    @property
    def available_bytes(self) -> int | None:
        if self.limit_bytes is None:
            return None
        return max(0, self.limit_bytes - self.working_set_bytes)


@dataclass(frozen=True, slots=True)
class IoStats:
    """I/O of one block device, known by its major and minor number."""

    device: tuple[int, int]
    read_bytes: int
    written_bytes: int
    reads: int
    writes: int


@dataclass(frozen=True, slots=True)
class PidsStats:
    """The number of tasks, which are processes and threads; `limit` is None without one."""

    current: int
    limit: int | None


@dataclass(frozen=True, slots=True)
class HugetlbStats:
    """Usage of huge pages of one size; `page_size` is like 2MB."""

    page_size: str
    usage_bytes: int
    max_usage_bytes: int


@dataclass(frozen=True, slots=True)
class PressureStats:
    """Pressure stall information; None where the kernel has none."""

    cpu: Pressure | None
    memory: Pressure | None
    io: Pressure | None


@dataclass(frozen=True, slots=True)
class CgroupStats:
    """The usage read at `at_ns` (Unix time); the part of a controller that is absent or failed is None or empty."""

    at_ns: int
    cpu: CpuStats | None
    memory: MemoryStats | None
    pids: PidsStats | None
    io: tuple[IoStats, ...]
    hugetlb: tuple[HugetlbStats, ...]
    pressure: PressureStats
