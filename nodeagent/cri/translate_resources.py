"""Translation of LinuxContainerResources to `Resources` and back."""

from nodeagent.api import runtime_pb2 as pb
from nodeagent.cgroups import limits
from nodeagent.cri import validate
from nodeagent.requests import Resources

# The CRI's names of fields that have another one in `Resources`.
_NAMES = {
    "cpu_period_usec": "cpu_period",
    "cpu_quota_usec": "cpu_quota",
    "memory_limit_bytes": "memory_limit_in_bytes",
    "memory_swap_limit_bytes": "memory_swap_limit_in_bytes",
}

# Fields that add up: the limits of a pod are those of its containers and its overhead.
_ADDABLE = frozenset(("cpu_period", "cpu_quota", "cpu_shares", "memory_limit_in_bytes"))


def pod_resources(message: pb.LinuxContainerResources, field: str) -> Resources:
    """Translate the limits of the cgroup above the containers."""
    if message.oom_score_adj:
        validate.refuse(f"{field}.oom_score_adj", "is of a container, a pod has none")
    return resources(message, field)


def overhead(message: pb.LinuxContainerResources, field: str) -> Resources:
    for given, _ in message.ListFields():
        if given.name not in _ADDABLE:
            validate.refuse(f"{field}.{given.name}", "cannot be added to the limits of a pod")
    return resources(message, field)


def resources(message: pb.LinuxContainerResources, field: str) -> Resources:
    """Translate limits: 0 is not set, -1 is no limit. Ranges are those of `cgroups.limits`."""
    wanted = Resources(
        cpu_period_usec=message.cpu_period,
        cpu_quota_usec=message.cpu_quota,
        cpu_shares=message.cpu_shares,
        memory_limit_bytes=message.memory_limit_in_bytes,
        memory_swap_limit_bytes=message.memory_swap_limit_in_bytes,
        cpuset_cpus=message.cpuset_cpus,
        cpuset_mems=message.cpuset_mems,
        oom_score_adj=message.oom_score_adj,
        hugepage_limits=_hugepages(message, f"{field}.hugepage_limits"),
        unified=dict(message.unified),
    )
    limits.check(wanted, lambda name: f"{field}.{_NAMES.get(name, name)}")
    return wanted


def _hugepages(message: pb.LinuxContainerResources, field: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for index, entry in enumerate(validate.bounded(message.hugepage_limits, field)):
        if entry.page_size in sizes:
            validate.refuse(f"{field}[{index}].page_size", f'"{entry.page_size}" has two limits')
        sizes[entry.page_size] = entry.limit
    return sizes


def message_of(resources: Resources) -> pb.LinuxContainerResources:
    return pb.LinuxContainerResources(
        cpu_period=resources.cpu_period_usec,
        cpu_quota=resources.cpu_quota_usec,
        cpu_shares=resources.cpu_shares,
        memory_limit_in_bytes=resources.memory_limit_bytes,
        memory_swap_limit_in_bytes=resources.memory_swap_limit_bytes,
        oom_score_adj=resources.oom_score_adj,
        cpuset_cpus=resources.cpuset_cpus,
        cpuset_mems=resources.cpuset_mems,
        hugepage_limits=[
            pb.HugepageLimit(page_size=size, limit=limit)
            for size, limit in resources.hugepage_limits.items()
        ],
        unified=resources.unified,
    )
