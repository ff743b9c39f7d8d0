"""The controllers of cgroup v2 and their files (Documentation/admin-guide/cgroup-v2.rst)."""

import errno
import os
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress

from nodeagent.cgroups import convert, devices, parse, tree
from nodeagent.cgroups.control import ControlFiles, Setting
from nodeagent.cgroups.convert import UNLIMITED, parse_max, to_max
from nodeagent.cgroups.stats import CpuStats, HugetlbStats, IoStats, MemoryStats, PidsStats
from nodeagent.errors import FailedPrecondition, InvalidArgument, Unsupported
from nodeagent.linux import oom
from nodeagent.requests import Resources

CPU_WEIGHT = "cpu.weight"
CPU_MAX = "cpu.max"
CPU_STAT = "cpu.stat"
CPUSET_CPUS = "cpuset.cpus"
CPUSET_MEMS = "cpuset.mems"
MEMORY_MAX = "memory.max"
MEMORY_SWAP_MAX = "memory.swap.max"
MEMORY_CURRENT = "memory.current"
MEMORY_SWAP_CURRENT = "memory.swap.current"
MEMORY_PEAK = "memory.peak"
MEMORY_RECLAIM = "memory.reclaim"
MEMORY_STAT = "memory.stat"
MEMORY_EVENTS = "memory.events.local"
PIDS_MAX = "pids.max"
PIDS_CURRENT = "pids.current"
HUGETLB_MAX = "hugetlb.{}.max"
HUGETLB_RESERVATION_MAX = "hugetlb.{}.rsvd.max"
HUGETLB_CURRENT = "hugetlb.{}.current"
IO_STAT = "io.stat"
DELEGATE = "/sys/kernel/cgroup/delegate"
SUBTREE_CONTROL = "cgroup.subtree_control"
MAX_DESCENDANTS = "cgroup.max.descendants"

DESCENDANTS = 4096  # enough for a node in a container, with a hundred pods

CONTROLLERS = frozenset({"cpu", "cpuset", "hugetlb", "io", "memory", "pids"})

OOM_EVENTS = MEMORY_EVENTS

_DEFAULT_CPU_MAX = "max 100000"

# Read back as `unified`, because the CRI has no other name for them.
_UNIFIED = ("memory.min", "memory.low", "memory.high", "memory.oom.group")

# Before Linux 5.18 memory.stat had no line "kernel".
_KERNEL_PARTS = (b"kernel_stack", b"pagetables", b"percpu", b"sock", b"slab")


# --- limits --------------------------------------------------------------------------------------------------------


def apply(files: ControlFiles, wanted: Resources, now: Resources) -> None:
    """Put `wanted` in force, all of it or nothing. now: the limits in force."""
    settings = plan(wanted, now, files)
    _make_room(files, dict(settings).get(MEMORY_MAX, "max"))
    files.write(settings)


def plan(wanted: Resources, now: Resources, files: ControlFiles) -> list[Setting]:
    """The settings to write. A unified value replaces one that is derived from a field."""
    values = dict(_derived(wanted, now, files)) | wanted.unified
    return [
        (name, line)
        for name, value in values.items()
        for line in value.splitlines()
        if not line.startswith("max") or files.has(name)
    ]


def _derived(wanted: Resources, now: Resources, files: ControlFiles) -> Iterator[Setting]:
    if wanted.cpu_shares:
        yield CPU_WEIGHT, str(convert.shares_to_weight(wanted.cpu_shares))
    if wanted.cpu_quota_usec or wanted.cpu_period_usec:
        quota = wanted.cpu_quota_usec or now.cpu_quota_usec
        yield CPU_MAX, convert.cpu_max(quota, wanted.cpu_period_usec or now.cpu_period_usec)
    if wanted.memory_limit_bytes:
        yield MEMORY_MAX, to_max(wanted.memory_limit_bytes)
    if wanted.memory_swap_limit_bytes:
        yield from _swap(wanted, now, files)
    if wanted.cpuset_cpus:
        yield CPUSET_CPUS, wanted.cpuset_cpus
    if wanted.cpuset_mems:
        yield CPUSET_MEMS, wanted.cpuset_mems
    if wanted.pids_limit:
        yield PIDS_MAX, to_max(wanted.pids_limit)
    for size, limit in wanted.hugepage_limits.items():
        yield from _hugepages(size, limit, files)


def _swap(wanted: Resources, now: Resources, files: ControlFiles) -> Iterator[Setting]:
    both = wanted.memory_swap_limit_bytes
    try:
        swap = convert.swap_max(both, wanted.memory_limit_bytes or now.memory_limit_bytes)
    except ValueError as error:
        raise InvalidArgument(f"memory_swap_limit_in_bytes: {error}") from None
    if swap > 0 and not files.has(MEMORY_SWAP_MAX):
        raise Unsupported(f"memory_swap_limit_in_bytes: {both}: this kernel does not account swap")
    if files.has(MEMORY_SWAP_MAX):
        yield MEMORY_SWAP_MAX, to_max(swap)


def _hugepages(size: str, limit: int, files: ControlFiles) -> Iterator[Setting]:
    name = HUGETLB_MAX.format(size)
    if limit or files.has(name):
        yield name, str(limit)
        if files.has(reservation := HUGETLB_RESERVATION_MAX.format(size)):
            yield reservation, str(limit)


def _make_room(files: ControlFiles, limit: str) -> None:
    """Refuse a limit that only the OOM killer could enforce: a write to memory.max reclaims, then kills."""
    if not limit.isdigit() or int(files.read(MEMORY_CURRENT, "0")) <= int(limit):
        return
    _reclaim(files, int(files.read(MEMORY_CURRENT)) - int(limit))
    stat = parse.flat_keyed(files.read(MEMORY_STAT).encode())
    cache = int(stat[b"active_file"]) + int(stat[b"inactive_file"])
    usage = int(files.read(MEMORY_CURRENT))
    if usage - cache > int(limit):
        raise FailedPrecondition(
            f'{files.path(MEMORY_MAX)}: cannot write "{limit}": {usage} bytes are in use'
        )


def _reclaim(files: ControlFiles, size: int) -> None:
    """Reclaim memory as far as possible; memory.reclaim exists since Linux 5.19."""
    try:
        with open(files.path(MEMORY_RECLAIM) or "", "w", encoding="ascii") as file:
            file.write(str(size))
    except OSError:
        pass


def resources(files: ControlFiles) -> Resources:
    """The limits in force, but for those of huge pages; -1 is none. cpu_shares gives the weight that is in force."""
    quota, period = convert.parse_cpu_max(files.read(CPU_MAX, _DEFAULT_CPU_MAX))
    memory = parse_max(files.read(MEMORY_MAX, "max"))
    swap = parse_max(files.read(MEMORY_SWAP_MAX, "max"))
    weight = int(files.read(CPU_WEIGHT, "0"))
    return Resources(
        cpu_period_usec=period,
        cpu_quota_usec=quota,
        cpu_shares=convert.weight_to_shares(weight) if weight else 0,
        cpuset_cpus=files.read(CPUSET_CPUS),
        cpuset_mems=files.read(CPUSET_MEMS),
        memory_limit_bytes=memory,
        memory_swap_limit_bytes=convert.memory_and_swap(swap, memory),
        pids_limit=parse_max(files.read(PIDS_MAX, "max")),
        unified={name: value for name in _UNIFIED if (value := files.read(name))},
    )


def enable(mount: str, path: str, controllers: AbstractSet[str]) -> None:
    """Make the control files of `controllers` appear in the group `path`, by having each group above pass them on.

    Raises FailedPrecondition where one of those has processes of its own, which forbids it.
    """
    lacking = []
    for directory in (*(mount + parent for parent in reversed(tree.ancestors(path))), mount):
        if controllers <= _words(directory, SUBTREE_CONTROL):
            break
        lacking.append(directory)
    # From the top down: a group can pass on only what it was given itself (cgroup-v2.rst, "Top-down Constraint").
    for directory in reversed(lacking):
        missing = controllers & _words(directory, "cgroup.controllers")
        missing -= _words(directory, SUBTREE_CONTROL)
        if missing:
            _pass_on(directory, missing)


def limit_descendants(directory: str) -> None:
    """Bound the number of groups that a container can make below its own.

    A node has room for 65,535 groups with a memory controller (MEM_CGROUP_ID_MAX); without one left, no container can
    be started.
    """
    with open(f"{directory}/{MAX_DESCENDANTS}", "w", encoding="ascii") as file:
        file.write(str(DESCENDANTS))


def delegate(directory: str, uid: int) -> None:
    """Give a user a group and the files in it that the kernel names as safe (cgroup-v2.rst, "Model of Delegation").

    Its limits stay the node's: their files are not among these.
    """
    try:
        with open(DELEGATE, encoding="ascii") as file:
            names = file.read().split()
    except FileNotFoundError:
        names = ["cgroup.procs", "cgroup.threads", SUBTREE_CONTROL]
    os.chown(directory, uid, -1)
    for name in names:
        with suppress(FileNotFoundError):  # of a controller that is not enabled here
            os.chown(f"{directory}/{name}", uid, -1)


def _pass_on(directory: str, controllers: AbstractSet[str]) -> None:
    change = " ".join(f"+{controller}" for controller in sorted(controllers))
    try:
        with open(f"{directory}/{SUBTREE_CONTROL}", "w", encoding="ascii") as file:
            file.write(change)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        raise FailedPrecondition(
            f'{directory}/{SUBTREE_CONTROL}: cannot write "{change}": the group has processes'
        ) from error


def _words(directory: str, name: str) -> AbstractSet[str]:
    with open(f"{directory}/{name}", encoding="ascii") as file:
        return set(file.read().split())


# --- devices -------------------------------------------------------------------------------------------------------


def set_devices(files: ControlFiles, rules: Sequence[devices.Rule] | None) -> None:
    """Allow `rules` and nothing else; None allows what the parent allows."""
    directory = os.open(os.path.dirname(files.path("") or ""), os.O_RDONLY | os.O_DIRECTORY)
    try:
        devices.attach(directory, None if rules is None else devices.program(rules))
    finally:
        os.close(directory)


# --- accounting ----------------------------------------------------------------------------------------------------


def cpu(files: ControlFiles) -> CpuStats | None:
    """CPU time, which is always there; periods and throttling are 0 without the controller."""
    if (data := files.sample(CPU_STAT)) is None:
        return None
    stat = parse.flat_keyed(data)
    return CpuStats(
        usage_ns=int(stat[b"usage_usec"]) * 1000,
        user_ns=int(stat[b"user_usec"]) * 1000,
        system_ns=int(stat[b"system_usec"]) * 1000,
        periods=int(stat.get(b"nr_periods", 0)),
        throttled_periods=int(stat.get(b"nr_throttled", 0)),
        throttled_ns=int(stat.get(b"throttled_usec", 0)) * 1000,
    )


def memory(files: ControlFiles) -> MemoryStats | None:
    usage, detail = files.sample(MEMORY_CURRENT), files.sample(MEMORY_STAT)
    if usage is None or detail is None:
        return None
    stat = parse.flat_keyed(detail)
    local = files.sample(MEMORY_EVENTS) or b""
    events = parse.flat_keyed(local)
    limit = parse_max(files.sample(MEMORY_MAX) or b"max")
    swap_limit = parse_max(files.sample(MEMORY_SWAP_MAX) or b"max")
    kernel = stat.get(b"kernel") or sum(int(stat.get(key, 0)) for key in _KERNEL_PARTS)
    return MemoryStats(
        usage_bytes=int(usage),
        limit_bytes=None if limit == UNLIMITED else limit,
        max_usage_bytes=int(files.sample(MEMORY_PEAK) or usage),
        rss_bytes=int(stat[b"anon"]),
        cache_bytes=int(stat[b"file"]),
        mapped_file_bytes=int(stat[b"file_mapped"]),
        active_file_bytes=int(stat[b"active_file"]),
        inactive_file_bytes=int(stat[b"inactive_file"]),
        kernel_bytes=int(kernel),
        swap_bytes=int(files.sample(MEMORY_SWAP_CURRENT) or 0),
        swap_limit_bytes=None if swap_limit == UNLIMITED else swap_limit,
        page_faults=int(stat[b"pgfault"]),
        major_page_faults=int(stat[b"pgmajfault"]),
        failures=int(events.get(b"max", 0)),
        oom_kills=oom.kills(local),
    )


def pids(files: ControlFiles) -> PidsStats | None:
    if (current := files.sample(PIDS_CURRENT)) is None:
        return None
    limit = parse_max(files.sample(PIDS_MAX) or b"max")
    return PidsStats(int(current), None if limit == UNLIMITED else limit)


def io(files: ControlFiles) -> tuple[IoStats, ...]:
    devices = parse.nested_keyed(files.sample(IO_STAT) or b"")
    return tuple(
        IoStats(
            device=parse.device_number(device),
            read_bytes=int(numbers[b"rbytes"]),
            written_bytes=int(numbers[b"wbytes"]),
            reads=int(numbers[b"rios"]),
            writes=int(numbers[b"wios"]),
        )
        for device, numbers in devices.items()
        if b"rbytes" in numbers
    )


def hugetlb(files: ControlFiles, page_sizes: Sequence[str]) -> tuple[HugetlbStats, ...]:
    """Usage of huge pages. v2 records no highest usage; the present one stands for it."""
    usages = ((size, int(files.sample(HUGETLB_CURRENT.format(size)) or 0)) for size in page_sizes)
    return tuple(HugetlbStats(size, usage, usage) for size, usage in usages)
