"""LinuxContainerResources to `Resources` and back."""

import re

from nodeagent.api import runtime_pb2 as pb
from nodeagent.cri import validate
from nodeagent.records import Resources

_CPUS = re.compile(r"\d{1,6}(-\d{1,6})?(,\d{1,6}(-\d{1,6})?)*")
_PAGE_SIZE = re.compile(r"[1-9]\d{0,6}(KB|MB|GB)")
_CGROUP_FILE = re.compile(r"cgroup\.max\.(depth|descendants)|(?!cgroup\.)[a-z]\w*(\.\w+)+")

_MAX = (1 << 63) - 1
_MIN_PERIOD_USEC, _MAX_PERIOD_USEC = 1_000, 1_000_000  # kernel/sched/core.c, tg_set_cfs_bandwidth
_MIN_QUOTA_USEC = 1_000
_MAX_UNIFIED = 256


# What adds up: the limits of a pod are those of its containers and its overhead.
_ADDABLE = frozenset(("cpu_period", "cpu_quota", "cpu_shares", "memory_limit_in_bytes"))


def pod_resources(message: pb.LinuxContainerResources, field: str) -> Resources:
    """Limits of the cgroup above containers."""
    if message.oom_score_adj:
        validate.refuse(f"{field}.oom_score_adj", "is of a container, a pod has none")
    return resources(message, field)


def overhead(message: pb.LinuxContainerResources, field: str) -> Resources:
    for given, _ in message.ListFields():
        if given.name not in _ADDABLE:
            validate.refuse(f"{field}.{given.name}", "cannot be added to the limits of a pod")
    return resources(message, field)


def resources(message: pb.LinuxContainerResources, field: str) -> Resources:
    """0 is not set, -1 without limit."""
    memory = validate.number(
        message.memory_limit_in_bytes, f"{field}.memory_limit_in_bytes", -1, _MAX
    )
    swap = validate.number(
        message.memory_swap_limit_in_bytes, f"{field}.memory_swap_limit_in_bytes", -1, _MAX
    )
    if swap > 0 and (memory == -1 or memory > swap):
        validate.refuse(
            f"{field}.memory_swap_limit_in_bytes",
            f"{swap} is memory and swap together, less than the {memory} of memory alone",
        )
    return Resources(
        cpu_period_usec=_period(message.cpu_period, f"{field}.cpu_period"),
        cpu_quota_usec=_quota(message.cpu_quota, f"{field}.cpu_quota"),
        cpu_shares=validate.number(message.cpu_shares, f"{field}.cpu_shares", 0, _MAX),
        memory_limit_bytes=memory,
        memory_swap_limit_bytes=swap,
        cpuset_cpus=_cpus(message.cpuset_cpus, f"{field}.cpuset_cpus"),
        cpuset_mems=_cpus(message.cpuset_mems, f"{field}.cpuset_mems"),
        oom_score_adj=validate.number(
            message.oom_score_adj, f"{field}.oom_score_adj", -1_000, 1_000
        ),
        hugepage_limits=_hugepages(message, f"{field}.hugepage_limits"),
        unified=_unified(message, f"{field}.unified"),
    )


def _period(value: int, field: str) -> int:
    return validate.number(value, field, _MIN_PERIOD_USEC, _MAX_PERIOD_USEC) if value else 0


def _quota(value: int, field: str) -> int:
    if value in (0, -1):
        return value
    return validate.number(value, field, _MIN_QUOTA_USEC, _MAX)


def _cpus(value: str, field: str) -> str:
    validate.text(value, field)
    return validate.matching(value, _CPUS, field, "a list like 0-3,7") if value else ""


def _hugepages(message: pb.LinuxContainerResources, field: str) -> dict[str, int]:
    limits: dict[str, int] = {}
    for index, entry in enumerate(validate.bounded(message.hugepage_limits, field)):
        where = f"{field}[{index}].page_size"
        size = validate.matching(entry.page_size, _PAGE_SIZE, where, "a size like 2MB")
        if size in limits:
            validate.refuse(where, f'"{size}" has two limits')
        limits[size] = entry.limit
    return limits


def _unified(message: pb.LinuxContainerResources, field: str) -> dict[str, str]:
    """Limits only: the other files that begin with ``cgroup.`` move, kill and freeze processes."""
    if len(message.unified) > _MAX_UNIFIED:
        validate.refuse(field, f"has more than {_MAX_UNIFIED} entries")
    for key, value in message.unified.items():
        validate.matching(key, _CGROUP_FILE, field, "the file of a limit")
        validate.text(value, f'{field}["{key}"]')
    return dict(message.unified)


def message_of(limits: Resources) -> pb.LinuxContainerResources:
    return pb.LinuxContainerResources(
        cpu_period=limits.cpu_period_usec,
        cpu_quota=limits.cpu_quota_usec,
        cpu_shares=limits.cpu_shares,
        memory_limit_in_bytes=limits.memory_limit_bytes,
        memory_swap_limit_in_bytes=limits.memory_swap_limit_bytes,
        oom_score_adj=limits.oom_score_adj,
        cpuset_cpus=limits.cpuset_cpus,
        cpuset_mems=limits.cpuset_mems,
        hugepage_limits=[
            pb.HugepageLimit(page_size=size, limit=limit)
            for size, limit in limits.hugepage_limits.items()
        ],
        unified=limits.unified,
    )
