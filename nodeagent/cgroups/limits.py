"""What a request for resources may say, before any file is touched. Says nothing about what the kernel has."""

import re
from collections.abc import Callable

from nodeagent.cgroups import parse
from nodeagent.cgroups.convert import UNLIMITED
from nodeagent.errors import InvalidArgument
from nodeagent.records import Resources

# Of sched_cfs: shorter or longer periods, and shorter quotas, are refused by every kernel.
MIN_PERIOD_USEC, MAX_PERIOD_USEC = 1_000, 1_000_000
MIN_QUOTA_USEC = 1_000

NOTHING = Resources()

# What a group has that was just made, as far as it matters for what is written to it.
NEW = Resources(
    cpu_period_usec=100_000,
    cpu_quota_usec=UNLIMITED,
    memory_limit_bytes=UNLIMITED,
    memory_swap_limit_bytes=UNLIMITED,
)

_PAGE_SIZE = re.compile(r"[1-9][0-9]{0,3}(KB|MB|GB)")
_UNIFIED_KEY = re.compile(r"[a-z0-9_]+(\.[A-Za-z0-9_]+)+")
_MAX_UNIFIED_VALUE = 4096

# The other cgroup.* files are not limits: they move, kill and freeze processes.
_GROUP_LIMITS = frozenset({"cgroup.max.depth", "cgroup.max.descendants"})


def check(wanted: Resources) -> None:
    """Raises InvalidArgument with the name of the field that is nonsense."""
    _check_cpu(wanted)
    _check_memory(wanted)
    _check_list("cpuset_cpus", wanted.cpuset_cpus)
    _check_list("cpuset_mems", wanted.cpuset_mems)
    _require("pids_limit", wanted.pids_limit, lambda n: n >= UNLIMITED)
    for size, limit in wanted.hugepage_limits.items():
        if not _PAGE_SIZE.fullmatch(size):
            raise InvalidArgument(f'hugepage_limits: "{size}" is not a page size like 2MB')
        _require(f"hugepage_limits[{size}]", limit, lambda n: n >= 0)
    for key, value in wanted.unified.items():
        _check_unified(key, value)


def _check_cpu(wanted: Resources) -> None:
    _require("cpu_shares", wanted.cpu_shares, lambda n: n >= 0)
    _require(
        "cpu_period_usec",
        wanted.cpu_period_usec,
        lambda n: n == 0 or MIN_PERIOD_USEC <= n <= MAX_PERIOD_USEC,
    )
    _require(
        "cpu_quota_usec",
        wanted.cpu_quota_usec,
        lambda n: n in (0, UNLIMITED) or n >= MIN_QUOTA_USEC,
    )


def _check_memory(wanted: Resources) -> None:
    limit, both = wanted.memory_limit_bytes, wanted.memory_swap_limit_bytes
    _require("memory_limit_bytes", limit, lambda n: n >= UNLIMITED)
    _require("memory_swap_limit_bytes", both, lambda n: n >= UNLIMITED)
    if both > 0 and (limit == UNLIMITED or limit > both):
        raise InvalidArgument(
            f"memory_swap_limit_bytes: {both} of memory and swap is less than the memory limit {limit}"
        )


def _check_list(field: str, text: str) -> None:
    if not text:
        return
    try:
        parse.number_list(text)
    except ValueError as error:
        raise InvalidArgument(f"{field}: {error}") from None


def _check_unified(key: str, value: str) -> None:
    if not _UNIFIED_KEY.fullmatch(key):
        raise InvalidArgument(f'unified: "{key}" is not the name of a control file')
    if key.startswith("cgroup.") and key not in _GROUP_LIMITS:
        raise InvalidArgument(f'unified: "{key}" is not a limit')
    if not value.strip() or "\0" in value or len(value) > _MAX_UNIFIED_VALUE:
        raise InvalidArgument(f'unified: "{key}" has no value that can be written')


def _require(field: str, value: int, valid: Callable[[int], bool]) -> None:
    if not valid(value):
        raise InvalidArgument(f"{field}: {value} is out of range")
