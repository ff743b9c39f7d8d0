"""Checks of a request for resources, before any file is touched. What the kernel has is not asked here.

The API checks a request when it reads it, by the names that its fields have there; a cgroup checks again what it is to
put in force.
"""

import re
from collections.abc import Callable, Mapping

from nodeagent.cgroups import parse
from nodeagent.cgroups.convert import UNLIMITED
from nodeagent.errors import InvalidArgument
from nodeagent.requests import Resources

# kernel/sched/core.c, tg_set_cfs_bandwidth: shorter or longer periods, and shorter quotas, are refused by every kernel.
_PERIODS_USEC = range(1_000, 1_000_001)
_MIN_QUOTA_USEC = 1_000

NOTHING = Resources()

# The limits of a group that was just made, as far as they matter for what is written to it.
NEW = Resources(
    cpu_period_usec=100_000,
    cpu_quota_usec=UNLIMITED,
    memory_limit_bytes=UNLIMITED,
    memory_swap_limit_bytes=UNLIMITED,
)

_OOM_SCORES = range(-1_000, 1_001)  # proc_pid_oom_score_adj(5)
_PAGE_SIZE = re.compile(r"[1-9][0-9]{0,6}(KB|MB|GB)")
_MAX_TEXT = 4096

# The other files that begin with ``cgroup.`` are no limits: they move, kill and freeze processes.
_CONTROL_FILE = re.compile(
    r"cgroup\.max\.(depth|descendants)|(?!cgroup\.)[a-z0-9_]+(\.[A-Za-z0-9_]+)+"
)
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f]")
_MAX_UNIFIED = 256

Naming = Callable[[str], str]


def check(wanted: Resources, named: Naming = str) -> None:
    """Raise InvalidArgument with the name of the field whose value no kernel can have.

    named: the requester's name for a field of `Resources`.
    """
    _check_cpu(wanted, named)
    _check_memory(wanted, named)
    _check_list(named("cpuset_cpus"), wanted.cpuset_cpus)
    _check_list(named("cpuset_mems"), wanted.cpuset_mems)
    score = wanted.oom_score_adj
    _require(named("oom_score_adj"), score, score in _OOM_SCORES)
    _require(named("pids_limit"), wanted.pids_limit, wanted.pids_limit >= UNLIMITED)
    for size, limit in wanted.hugepage_limits.items():
        field = f'{named("hugepage_limits")}["{size[:_MAX_TEXT]}"]'
        if not _PAGE_SIZE.fullmatch(size):
            raise InvalidArgument(f"{field}: not a page size like 2MB")
        _require(field, limit, limit >= 0)
    _check_unified(named("unified"), wanted.unified)


def _check_cpu(wanted: Resources, named: Naming) -> None:
    shares, period, quota = wanted.cpu_shares, wanted.cpu_period_usec, wanted.cpu_quota_usec
    _require(named("cpu_shares"), shares, shares >= 0)
    _require(named("cpu_period_usec"), period, period == 0 or period in _PERIODS_USEC)
    is_quota = quota in (0, UNLIMITED) or quota >= _MIN_QUOTA_USEC
    _require(named("cpu_quota_usec"), quota, is_quota)


def _check_memory(wanted: Resources, named: Naming) -> None:
    limit, both = wanted.memory_limit_bytes, wanted.memory_swap_limit_bytes
    field = named("memory_swap_limit_bytes")
    _require(named("memory_limit_bytes"), limit, limit >= UNLIMITED)
    _require(field, both, both >= UNLIMITED)
    if both > 0 and (limit == UNLIMITED or limit > both):
        raise InvalidArgument(
            f"{field}: {both} is memory and swap together, less than the {limit} of memory alone"
        )


def _check_list(field: str, text: str) -> None:
    if not text:
        return
    if len(text) > _MAX_TEXT:
        raise InvalidArgument(f"{field}: is longer than {_MAX_TEXT} characters")
    try:
        parse.number_list(text)
    except ValueError as error:
        raise InvalidArgument(f"{field}: {error}") from None


def _check_unified(field: str, unified: Mapping[str, str]) -> None:
    if len(unified) > _MAX_UNIFIED:
        raise InvalidArgument(f"{field}: has more than {_MAX_UNIFIED} entries")
    for key, value in unified.items():
        where = f'{field}["{key[:_MAX_TEXT]}"]'
        if not _CONTROL_FILE.fullmatch(key):
            raise InvalidArgument(f"{where}: not the file of a limit")
        if not value.strip() or len(value) > _MAX_TEXT or _CONTROL_CHARACTER.search(value):
            raise InvalidArgument(f"{where}: has no value that can be written")


def _require(field: str, value: int, is_valid: bool) -> None:
    if not is_valid:
        raise InvalidArgument(f"{field}: {value} is out of range")
