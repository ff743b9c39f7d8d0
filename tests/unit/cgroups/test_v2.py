from pathlib import Path

import pytest

from nodeagent.cgroups import v2
from nodeagent.cgroups.control import ControlFiles, Setting
from nodeagent.errors import InvalidArgument, Unsupported
from nodeagent.requests import Resources

NOW = Resources(
    cpu_period_usec=100_000,
    cpu_quota_usec=50_000,
    memory_limit_bytes=100,
    memory_swap_limit_bytes=150,
)


def plan(tmp_path: Path, wanted: Resources, *present: str) -> list[Setting]:
    for name in present:
        (tmp_path / name).touch()
    return v2.plan(wanted, NOW, ControlFiles({"": str(tmp_path)}))


def test_what_is_not_set_stays(tmp_path: Path) -> None:
    assert plan(tmp_path, Resources()) == []


def test_every_field(tmp_path: Path) -> None:
    wanted = Resources(
        cpu_shares=1024,
        cpu_quota_usec=20_000,
        cpu_period_usec=10_000,
        memory_limit_bytes=4096,
        memory_swap_limit_bytes=8192,
        cpuset_cpus="0",
        cpuset_mems="0",
        pids_limit=7,
        hugepage_limits={"2MB": 4096},
    )
    assert plan(tmp_path, wanted, v2.MEMORY_SWAP_MAX, "hugetlb.2MB.rsvd.max") == [
        ("cpu.weight", "100"),
        ("cpu.max", "20000 10000"),
        ("memory.max", "4096"),
        ("memory.swap.max", "4096"),
        ("cpuset.cpus", "0"),
        ("cpuset.mems", "0"),
        ("pids.max", "7"),
        ("hugetlb.2MB.max", "4096"),
        ("hugetlb.2MB.rsvd.max", "4096"),
    ]


@pytest.mark.parametrize(
    ("wanted", "line"),
    [
        (Resources(cpu_quota_usec=1000), "1000 100000"),
        (Resources(cpu_quota_usec=-1), "max 100000"),
        (Resources(cpu_period_usec=1000), "50000 1000"),
    ],
)
def test_the_other_half_of_cpu_max_stays(tmp_path: Path, wanted: Resources, line: str) -> None:
    assert plan(tmp_path, wanted, v2.CPU_MAX) == [("cpu.max", line)]


@pytest.mark.parametrize(
    ("limit", "both", "swap"), [(100, 100, "0"), (0, 130, "30"), (100, -1, "max"), (-1, -1, "max")]
)
def test_swap(tmp_path: Path, limit: int, both: int, swap: str) -> None:
    wanted = Resources(memory_limit_bytes=limit, memory_swap_limit_bytes=both)
    present = (v2.MEMORY_SWAP_MAX, v2.MEMORY_MAX)
    assert plan(tmp_path, wanted, *present)[-1] == ("memory.swap.max", swap)


def test_swap_below_the_memory_limit_in_force(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="memory_swap_limit_in_bytes: 99"):
        plan(tmp_path, Resources(memory_swap_limit_bytes=99))


def test_without_swap_accounting(tmp_path: Path) -> None:
    no_swap = Resources(memory_limit_bytes=100, memory_swap_limit_bytes=100)
    assert plan(tmp_path, no_swap) == [("memory.max", "100")]
    with pytest.raises(Unsupported, match="swap"):
        plan(tmp_path, Resources(memory_limit_bytes=1, memory_swap_limit_bytes=2))


def test_unified_wins_and_comes_line_by_line(tmp_path: Path) -> None:
    wanted = Resources(
        memory_limit_bytes=4096,
        unified={"memory.max": "8192", "memory.oom.group": "1", "io.max": "8:0 rbps=1\n8:1 rbps=2"},
    )
    assert plan(tmp_path, wanted) == [
        ("memory.max", "8192"),
        ("memory.oom.group", "1"),
        ("io.max", "8:0 rbps=1"),
        ("io.max", "8:1 rbps=2"),
    ]


def test_no_limit_needs_no_controller(tmp_path: Path) -> None:
    wanted = Resources(
        cpu_quota_usec=-1,
        memory_limit_bytes=-1,
        pids_limit=-1,
        hugepage_limits={"2MB": 0},
        unified={"memory.high": "max"},
    )
    assert plan(tmp_path, wanted) == []


def test_io(tmp_path: Path) -> None:
    (tmp_path / v2.IO_STAT).write_text(
        "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n7:0 cost.usage=1\n"
    )
    files = ControlFiles({"": str(tmp_path)})
    (device,) = v2.io(files)
    assert (device.device, device.read_bytes, device.written_bytes) == ((8, 0), 1, 2)
    assert (device.reads, device.writes) == (3, 4)
    files.close()
