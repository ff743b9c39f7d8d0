"""The controllers of cgroup v1 and their files (Documentation/admin-guide/cgroup-v1/)."""

import os
from collections.abc import Iterator, Sequence

from nodeagent.cgroups import parse
from nodeagent.cgroups.control import ControlFiles, Setting
from nodeagent.cgroups.convert import UNLIMITED, parse_v1_limit, to_max
from nodeagent.cgroups.devices import Rule
from nodeagent.cgroups.stats import CpuStats, HugetlbStats, IoStats, MemoryStats, PidsStats
from nodeagent.errors import InvalidArgument, PermissionDenied, Unsupported
from nodeagent.linux import oom
from nodeagent.requests import Resources

CPU_SHARES = "cpu.shares"
CPU_PERIOD = "cpu.cfs_period_us"
CPU_QUOTA = "cpu.cfs_quota_us"
CPU_STAT = "cpu.stat"
CPU_USAGE = "cpuacct.usage"
CPU_USER = "cpuacct.usage_user"
CPU_SYSTEM = "cpuacct.usage_sys"
CPUSET_CPUS = "cpuset.cpus"
CPUSET_MEMS = "cpuset.mems"
CLONE_CHILDREN = "cgroup.clone_children"
MEMORY_LIMIT = "memory.limit_in_bytes"
MEMORY_SWAP_LIMIT = "memory.memsw.limit_in_bytes"
MEMORY_USAGE = "memory.usage_in_bytes"
MEMORY_MAX_USAGE = "memory.max_usage_in_bytes"
MEMORY_KERNEL_USAGE = "memory.kmem.usage_in_bytes"
MEMORY_FAILURES = "memory.failcnt"
MEMORY_SWAP_FAILURES = "memory.memsw.failcnt"
MEMORY_STAT = "memory.stat"
MEMORY_OOM = "memory.oom_control"
PIDS_LIMIT = "pids.max"
PIDS_CURRENT = "pids.current"
HUGETLB_LIMIT = "hugetlb.{}.limit_in_bytes"
HUGETLB_RESERVATION_LIMIT = "hugetlb.{}.rsvd.limit_in_bytes"
HUGETLB_USAGE = "hugetlb.{}.usage_in_bytes"
HUGETLB_MAX_USAGE = "hugetlb.{}.max_usage_in_bytes"
IO_BYTES = "blkio.throttle.io_service_bytes_recursive"
IO_OPERATIONS = "blkio.throttle.io_serviced_recursive"
DEVICES_ALLOW = "devices.allow"
DEVICES_DENY = "devices.deny"

OOM_EVENTS = MEMORY_OOM

_DEFAULT_PERIOD_USEC = 100_000

# Asking for these needs no controller.
_NO_LIMIT = ("-1", "max")


# --- limits --------------------------------------------------------------------------------------------------------


def apply(files: ControlFiles, wanted: Resources, now: Resources) -> None:
    """Put `wanted` in force, all of it or nothing. now: the limits in force."""
    files.write(plan(wanted, now, files))


def plan(wanted: Resources, now: Resources, files: ControlFiles) -> list[Setting]:
    """The settings to write, in an order in which each step is valid."""
    if wanted.unified:
        raise Unsupported(f"unified: {', '.join(sorted(wanted.unified))}: needs cgroup v2")
    settings = [*_cpu(wanted, now), *_memory(wanted, now, files), *_hugepages(wanted, files)]
    if wanted.cpuset_cpus:
        settings.append((CPUSET_CPUS, wanted.cpuset_cpus))
    if wanted.cpuset_mems:
        settings.append((CPUSET_MEMS, wanted.cpuset_mems))
    if wanted.pids_limit:
        settings.append((PIDS_LIMIT, to_max(wanted.pids_limit)))
    return [s for s in settings if s[1] not in _NO_LIMIT or files.has(s[0])]


def _cpu(wanted: Resources, now: Resources) -> Iterator[Setting]:
    """The CPU's settings: the kernel refuses a quota above the parent's share of time, even between two writes."""
    quota = wanted.cpu_quota_usec
    if wanted.cpu_period_usec not in (0, now.cpu_period_usec):
        yield CPU_QUOTA, str(UNLIMITED)  # which is valid with any period
        yield CPU_PERIOD, str(wanted.cpu_period_usec)
        quota = quota or now.cpu_quota_usec
    if quota:
        yield CPU_QUOTA, str(quota)
    if wanted.cpu_shares:
        yield CPU_SHARES, str(wanted.cpu_shares)


def _memory(wanted: Resources, now: Resources, files: ControlFiles) -> Iterator[Setting]:
    """The memory's settings: the kernel refuses a limit of memory and swap below that of memory alone."""
    limit = wanted.memory_limit_bytes or now.memory_limit_bytes
    if not files.has(MEMORY_SWAP_LIMIT):
        _refuse_swap(wanted.memory_swap_limit_bytes, limit)
        both = now.memory_swap_limit_bytes
    else:
        both = wanted.memory_swap_limit_bytes or _keep_swap(limit, now)
    if both != UNLIMITED and (limit == UNLIMITED or both < limit):
        raise InvalidArgument(
            f"memory_swap_limit_in_bytes: {both} of memory and swap is less than the memory limit {limit}"
        )
    # So the wider one is raised first, and lowered last.
    steps = [(MEMORY_LIMIT, limit, now.memory_limit_bytes)]
    shrinks = now.memory_swap_limit_bytes == UNLIMITED or 0 <= both < now.memory_swap_limit_bytes
    steps.insert(1 if shrinks else 0, (MEMORY_SWAP_LIMIT, both, now.memory_swap_limit_bytes))
    for name, value, old in steps:
        if value != old:
            yield name, str(value)


def _keep_swap(limit: int, now: Resources) -> int:
    """The limit of memory and swap that allows as much swap as at present."""
    both = now.memory_swap_limit_bytes
    if UNLIMITED in (both, limit):
        return UNLIMITED
    return both if now.memory_limit_bytes == UNLIMITED else limit + both - now.memory_limit_bytes


def _refuse_swap(both: int, limit: int) -> None:
    """Refuse a limit of swap on a kernel that does not account it (before 6.1); none and unlimited are allowed."""
    if both not in (0, UNLIMITED, limit):
        raise Unsupported(
            f"memory_swap_limit_in_bytes: {both}: this kernel does not account swap (swapaccount=1)"
        )


def _hugepages(wanted: Resources, files: ControlFiles) -> Iterator[Setting]:
    for size, limit in wanted.hugepage_limits.items():
        name = HUGETLB_LIMIT.format(size)
        if limit or files.has(name):
            yield name, str(limit)
            if files.has(reservation := HUGETLB_RESERVATION_LIMIT.format(size)):
                yield reservation, str(limit)


def resources(files: ControlFiles) -> Resources:
    """The limits in force, but for those of huge pages; -1 is none."""
    memory = parse_v1_limit(files.read(MEMORY_LIMIT, "-1"))
    return Resources(
        cpu_period_usec=int(files.read(CPU_PERIOD, str(_DEFAULT_PERIOD_USEC))),
        cpu_quota_usec=int(files.read(CPU_QUOTA, "-1")),
        cpu_shares=int(files.read(CPU_SHARES, "0")),
        cpuset_cpus=files.read(CPUSET_CPUS),
        cpuset_mems=files.read(CPUSET_MEMS),
        memory_limit_bytes=memory,
        memory_swap_limit_bytes=parse_v1_limit(files.read(MEMORY_SWAP_LIMIT, "-1")),
        pids_limit=parse_v1_limit(files.read(PIDS_LIMIT, "-1")),
    )


def fill_cpuset(mount: str, path: str) -> None:
    """Give a new group the CPUs and memory nodes of its parent: no process can join one without any.

    Parents without any are filled first, and have the kernel fill their further children (cgroup.clone_children).
    """
    directory = mount + path
    for name in (CPUSET_CPUS, CPUSET_MEMS):
        if _read(directory, name) or path == "/":
            continue
        parent = os.path.dirname(path)
        if not _read(mount + parent, name):
            fill_cpuset(mount, parent)
            with open(f"{mount}{parent}/{CLONE_CHILDREN}", "w", encoding="ascii") as file:
                file.write("1")
        with open(f"{directory}/{name}", "w", encoding="ascii") as file:
            file.write(_read(mount + parent, name))


def _read(directory: str, name: str) -> str:
    with open(f"{directory}/{name}", encoding="ascii") as file:
        return file.read().strip()


# --- devices -------------------------------------------------------------------------------------------------------


def set_devices(files: ControlFiles, rules: Sequence[Rule] | None) -> None:
    """Allow `rules` and nothing else; None allows all that the parent has. The group must have no children."""
    if files.path(DEVICES_ALLOW) is None:
        if rules is None:
            return
        raise Unsupported("devices: the controller is not mounted")
    if rules is None:
        _write(files, DEVICES_ALLOW, "a")
        return
    _write(files, DEVICES_DENY, "a")
    for rule in rules:
        _write(files, DEVICES_ALLOW, str(rule))


def _write(files: ControlFiles, name: str, value: str) -> None:
    """Write to a file that cannot be read, so that nothing can be set back."""
    path = files.path(name)
    assert path is not None
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(value)
    except PermissionError as error:
        raise PermissionDenied(f'{path}: the parent group does not allow "{value}"') from error


# --- accounting ----------------------------------------------------------------------------------------------------


def cpu(files: ControlFiles) -> CpuStats | None:
    """CPU time: the usage is measured, user and system time are sampled at ticks, so the parts need not add up."""
    usage, user, system = map(files.sample, (CPU_USAGE, CPU_USER, CPU_SYSTEM))
    if usage is None or user is None or system is None:
        return None
    throttling = parse.flat_keyed(files.sample(CPU_STAT) or b"")
    return CpuStats(
        usage_ns=int(usage),
        user_ns=int(user),
        system_ns=int(system),
        periods=int(throttling.get(b"nr_periods", 0)),
        throttled_periods=int(throttling.get(b"nr_throttled", 0)),
        throttled_ns=int(throttling.get(b"throttled_time", 0)),
    )


def memory(files: ControlFiles) -> MemoryStats | None:
    usage, detail = files.sample(MEMORY_USAGE), files.sample(MEMORY_STAT)
    if usage is None or detail is None:
        return None
    stat = parse.flat_keyed(detail)
    limit = parse_v1_limit(files.sample(MEMORY_LIMIT) or b"-1")
    both = parse_v1_limit(files.sample(MEMORY_SWAP_LIMIT) or b"-1")
    # The file has numbers of the group alone, and beginning with total_ those with its children.
    return MemoryStats(
        usage_bytes=int(usage),
        limit_bytes=None if limit == UNLIMITED else limit,
        max_usage_bytes=int(files.sample(MEMORY_MAX_USAGE) or usage),
        rss_bytes=int(stat.get(b"total_rss", 0)),
        cache_bytes=int(stat.get(b"total_cache", 0)),
        mapped_file_bytes=int(stat.get(b"total_mapped_file", 0)),
        active_file_bytes=int(stat.get(b"total_active_file", 0)),
        inactive_file_bytes=int(stat.get(b"total_inactive_file", 0)),
        kernel_bytes=int(files.sample(MEMORY_KERNEL_USAGE) or 0),
        swap_bytes=int(stat.get(b"total_swap", 0)),
        swap_limit_bytes=None if both == UNLIMITED else both - limit,
        page_faults=int(stat.get(b"total_pgfault", 0)),
        major_page_faults=int(stat.get(b"total_pgmajfault", 0)),
        failures=_failures(files),
        oom_kills=oom.kills(files.sample(MEMORY_OOM) or b""),
    )


def _failures(files: ControlFiles) -> int:
    """How often either limit was hit: with both at the same value it is that of memory and swap."""
    return int(files.sample(MEMORY_FAILURES) or 0) + int(files.sample(MEMORY_SWAP_FAILURES) or 0)


def pids(files: ControlFiles) -> PidsStats | None:
    current, limit = files.sample(PIDS_CURRENT), parse_v1_limit(files.sample(PIDS_LIMIT) or b"max")
    if current is None:
        return None
    return PidsStats(int(current), None if limit == UNLIMITED else limit)


def io(files: ControlFiles) -> tuple[IoStats, ...]:
    sizes = parse.device_operations(files.sample(IO_BYTES) or b"")
    if not sizes:
        return ()
    counts = parse.device_operations(files.sample(IO_OPERATIONS) or b"")
    return tuple(
        IoStats(
            device=parse.device_number(device),
            read_bytes=sizes.get((device, b"Read"), 0),
            written_bytes=sizes.get((device, b"Write"), 0),
            reads=counts.get((device, b"Read"), 0),
            writes=counts.get((device, b"Write"), 0),
        )
        for device in dict.fromkeys(device for device, _ in sizes)
    )


def hugetlb(files: ControlFiles, page_sizes: Sequence[str]) -> tuple[HugetlbStats, ...]:
    return tuple(
        HugetlbStats(
            size,
            int(files.sample(HUGETLB_USAGE.format(size)) or 0),
            int(files.sample(HUGETLB_MAX_USAGE.format(size)) or 0),
        )
        for size in page_sizes
    )
