"""Conversions between the CRI's units, which are those of cgroup v1, and those of cgroup v2: pure functions.

A limit of -1 is no limit, as in the CRI.
"""

import math

UNLIMITED = -1

MIN_SHARES, MAX_SHARES = 2, 262144
MIN_WEIGHT, MAX_WEIGHT = 1, 10000

# A v1 counter without limit holds PAGE_COUNTER_MAX pages, which is LONG_MAX / PAGE_SIZE.
_V1_NO_LIMIT = 1 << 62


def shares_to_weight(shares: int) -> int:
    """The cpu.weight for cpu.shares: 2, 1024 and 262144 become 1, 100 and 10000.

    The curve of opencontainers/cgroups 0.0.5 and crun 1.23: with l = log2(shares) the weight is the
    ceiling of 10 to the power of (l² + 125 l) / 612 - 7 / 34.
    """
    if shares <= MIN_SHARES:
        return MIN_WEIGHT
    if shares >= MAX_SHARES:
        return MAX_WEIGHT
    log = math.log2(shares)
    return math.ceil(10 ** ((log * log + 125 * log - 126) / 612))


def weight_to_shares(weight: int) -> int:
    """The greatest cpu.shares that `shares_to_weight` turns into `weight`."""
    constant = 126 + 612 * math.log10(weight)
    log = (math.sqrt(125 * 125 + 4 * constant) - 125) / 2
    shares = round(2**log)
    return shares if shares_to_weight(shares) <= weight else shares - 1


def cpu_max(quota_usec: int, period_usec: int) -> str:
    """The line to write to cpu.max."""
    quota = "max" if quota_usec == UNLIMITED else str(quota_usec)
    return f"{quota} {period_usec}"


def parse_cpu_max(text: str) -> tuple[int, int]:
    """The quota and period in a line of cpu.max."""
    quota, period = text.split()
    return parse_max(quota), int(period)


def to_max(limit: int) -> str:
    """A limit as cgroup v2 writes it."""
    return "max" if limit == UNLIMITED else str(limit)


def parse_max(text: str | bytes) -> int:
    """The reverse of `to_max`."""
    return UNLIMITED if text.strip() in ("max", b"max") else int(text)


def parse_v1_limit(text: str | bytes) -> int:
    """The limit in a v1 counter; memory and hugetlb show no limit as an enormous number of bytes."""
    if text.strip() in ("max", b"max"):
        return UNLIMITED
    limit = int(text)
    return UNLIMITED if limit >= _V1_NO_LIMIT or limit < 0 else limit


def swap_max(memory_and_swap: int, memory: int) -> int:
    """The memory.swap.max, which is swap alone, for a v1 limit of memory and swap together.

    Raises `ValueError` where the two do not fit.
    """
    if memory_and_swap == UNLIMITED:
        return UNLIMITED
    if memory == UNLIMITED:
        raise ValueError("a limit of memory and swap needs a memory limit")
    if memory_and_swap < memory:
        raise ValueError(f"{memory_and_swap} is less than the memory limit {memory}")
    return memory_and_swap - memory


def memory_and_swap(swap: int, memory: int) -> int:
    """The reverse of `swap_max`."""
    return UNLIMITED if UNLIMITED in (swap, memory) else swap + memory
