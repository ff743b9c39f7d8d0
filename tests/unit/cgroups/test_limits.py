import pytest

from nodeagent.cgroups import limits
from nodeagent.errors import InvalidArgument
from nodeagent.requests import Resources


@pytest.mark.parametrize(
    "resources",
    [
        Resources(),
        Resources(cpu_quota_usec=-1, cpu_period_usec=100_000, cpu_shares=2),
        Resources(memory_limit_bytes=-1, memory_swap_limit_bytes=-1, pids_limit=-1),
        Resources(memory_limit_bytes=1 << 20, memory_swap_limit_bytes=1 << 20),
        Resources(cpuset_cpus="0-1,7", cpuset_mems="0"),
        Resources(hugepage_limits={"2MB": 0, "64KB": 65536, "1GB": 1 << 30}),
        Resources(unified={"memory.high": "max", "hugetlb.2MB.max": "0"}),
        Resources(unified={"cgroup.max.depth": "5"}),
    ],
)
def test_sense(resources: Resources) -> None:
    limits.check(resources)


@pytest.mark.parametrize(
    ("field", "resources"),
    [
        ("cpu_shares", Resources(cpu_shares=-1)),
        ("cpu_period_usec", Resources(cpu_period_usec=999)),
        ("cpu_period_usec", Resources(cpu_period_usec=1_000_001)),
        ("cpu_quota_usec", Resources(cpu_quota_usec=999)),
        ("cpu_quota_usec", Resources(cpu_quota_usec=-2)),
        ("memory_limit_bytes", Resources(memory_limit_bytes=-2)),
        ("memory_swap_limit_bytes", Resources(memory_swap_limit_bytes=-2)),
        ("memory_swap_limit_bytes", Resources(memory_limit_bytes=2, memory_swap_limit_bytes=1)),
        ("memory_swap_limit_bytes", Resources(memory_limit_bytes=-1, memory_swap_limit_bytes=1)),
        ("pids_limit", Resources(pids_limit=-2)),
        ("cpuset_cpus", Resources(cpuset_cpus="0-")),
        ("cpuset_mems", Resources(cpuset_mems="x")),
        ("cpuset_cpus", Resources(cpuset_cpus="0," * 2048 + "0")),
        ("oom_score_adj", Resources(oom_score_adj=1001)),
        ("hugepage_limits", Resources(hugepage_limits={"2M": 1})),
        ("hugepage_limits", Resources(hugepage_limits={"../2MB": 1})),
        ("hugepage_limits", Resources(hugepage_limits={"2MB": -1})),
        ("unified", Resources(unified={"../x.y": "1"})),
        ("unified", Resources(unified={"memory": "1"})),
        ("unified", Resources(unified={"cgroup.procs": "1"})),
        ("unified", Resources(unified={"cgroup.kill": "1"})),
        ("unified", Resources(unified={"memory.max": " "})),
        ("unified", Resources(unified={"memory.max": "1\n2"})),
        ("unified", Resources(unified={"memor\u0131.max": "1"})),
        ("unified", Resources(unified={f"a.b{n}": "1" for n in range(257)})),
        ("unified", Resources(unified={"memory.max": "1" * 5000})),
    ],
)
def test_nonsense(field: str, resources: Resources) -> None:
    with pytest.raises(InvalidArgument, match=field):
        limits.check(resources)


def test_a_field_is_named_as_the_caller_calls_it() -> None:
    with pytest.raises(InvalidArgument, match=r"linux\.cpu_shares: -1"):
        limits.check(Resources(cpu_shares=-1), lambda name: f"linux.{name}")
