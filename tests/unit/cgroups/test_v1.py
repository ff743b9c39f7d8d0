from pathlib import Path

import pytest

from nodeagent.cgroups import v1
from nodeagent.cgroups.control import ControlFiles, Setting
from nodeagent.errors import InvalidArgument, Unsupported
from nodeagent.requests import Resources

NOTHING = Resources(
    cpu_period_usec=100_000,
    cpu_quota_usec=-1,
    cpu_shares=1024,
    memory_limit_bytes=-1,
    memory_swap_limit_bytes=-1,
    pids_limit=-1,
)
LIMITED = Resources(
    cpu_period_usec=100_000,
    cpu_quota_usec=50_000,
    memory_limit_bytes=100,
    memory_swap_limit_bytes=150,
)


def plan(tmp_path: Path, wanted: Resources, now: Resources = NOTHING) -> list[Setting]:
    for name in (v1.MEMORY_LIMIT, v1.MEMORY_SWAP_LIMIT, v1.CPU_QUOTA, v1.PIDS_LIMIT):
        (tmp_path / name).touch()
    return v1.plan(wanted, now, ControlFiles({"": str(tmp_path)}))


def test_what_is_not_set_stays(tmp_path: Path) -> None:
    assert plan(tmp_path, Resources()) == []
    assert plan(tmp_path, Resources(), LIMITED) == []


def test_a_new_period_needs_no_quota_in_between(tmp_path: Path) -> None:
    assert plan(tmp_path, Resources(cpu_period_usec=10_000), LIMITED) == [
        (v1.CPU_QUOTA, "-1"),
        (v1.CPU_PERIOD, "10000"),
        (v1.CPU_QUOTA, "50000"),
    ]
    same = Resources(cpu_period_usec=100_000, cpu_quota_usec=1000)
    assert plan(tmp_path, same, LIMITED) == [(v1.CPU_QUOTA, "1000")]


@pytest.mark.parametrize(
    ("limit", "both", "order"),
    [
        (200, 300, [(v1.MEMORY_SWAP_LIMIT, "300"), (v1.MEMORY_LIMIT, "200")]),
        (50, 60, [(v1.MEMORY_LIMIT, "50"), (v1.MEMORY_SWAP_LIMIT, "60")]),
        (-1, -1, [(v1.MEMORY_SWAP_LIMIT, "-1"), (v1.MEMORY_LIMIT, "-1")]),
        (0, 120, [(v1.MEMORY_SWAP_LIMIT, "120")]),
        (120, 150, [(v1.MEMORY_LIMIT, "120")]),
        # the allowance of 50 for swap stays
        (200, 0, [(v1.MEMORY_SWAP_LIMIT, "250"), (v1.MEMORY_LIMIT, "200")]),
        (10, 0, [(v1.MEMORY_LIMIT, "10"), (v1.MEMORY_SWAP_LIMIT, "60")]),
        (-1, 0, [(v1.MEMORY_SWAP_LIMIT, "-1"), (v1.MEMORY_LIMIT, "-1")]),
    ],
)
def test_order_of_memory(tmp_path: Path, limit: int, both: int, order: list[Setting]) -> None:
    wanted = Resources(memory_limit_bytes=limit, memory_swap_limit_bytes=both)
    assert plan(tmp_path, wanted, LIMITED) == order


def test_memory_from_no_limit(tmp_path: Path) -> None:
    wanted = Resources(memory_limit_bytes=100, memory_swap_limit_bytes=100)
    assert plan(tmp_path, wanted) == [(v1.MEMORY_LIMIT, "100"), (v1.MEMORY_SWAP_LIMIT, "100")]
    assert plan(tmp_path, Resources(memory_limit_bytes=100)) == [(v1.MEMORY_LIMIT, "100")]


def test_swap_below_the_memory_limit_in_force(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="memory_swap_limit_in_bytes: 99"):
        plan(tmp_path, Resources(memory_swap_limit_bytes=99), LIMITED)


def test_without_swap_accounting() -> None:
    files = ControlFiles({"memory": "/nonexistent"})
    no_swap = Resources(memory_limit_bytes=100, memory_swap_limit_bytes=100)
    assert v1.plan(no_swap, NOTHING, files) == [(v1.MEMORY_LIMIT, "100")]
    with pytest.raises(Unsupported, match="swap"):
        v1.plan(Resources(memory_limit_bytes=1, memory_swap_limit_bytes=2), NOTHING, files)


def test_no_limit_needs_no_controller() -> None:
    wanted = Resources(cpu_quota_usec=-1, pids_limit=-1, hugepage_limits={"2MB": 0, "1GB": 0})
    assert v1.plan(wanted, NOTHING, ControlFiles({})) == []


def test_a_limit_needs_its_controller() -> None:
    wanted = Resources(hugepage_limits={"2MB": 1})
    assert v1.plan(wanted, NOTHING, ControlFiles({})) == [("hugetlb.2MB.limit_in_bytes", "1")]


def test_reserved_huge_pages_count(tmp_path: Path) -> None:
    (tmp_path / "hugetlb.2MB.limit_in_bytes").touch()
    (tmp_path / "hugetlb.2MB.rsvd.limit_in_bytes").touch()
    assert plan(tmp_path, Resources(hugepage_limits={"2MB": 0})) == [
        ("hugetlb.2MB.limit_in_bytes", "0"),
        ("hugetlb.2MB.rsvd.limit_in_bytes", "0"),
    ]


def test_unified_is_of_v2() -> None:
    with pytest.raises(Unsupported, match=r"memory\.high"):
        v1.plan(Resources(unified={"memory.high": "1"}), NOTHING, ControlFiles({}))


def test_io(tmp_path: Path) -> None:
    (tmp_path / v1.IO_BYTES).write_text("8:0 Read 10\n8:0 Write 20\n8:0 Total 30\nTotal 30\n")
    (tmp_path / v1.IO_OPERATIONS).write_text("8:0 Read 1\n8:0 Write 2\n8:0 Total 3\nTotal 3\n")
    files = ControlFiles({"blkio": str(tmp_path)})
    (device,) = v1.io(files)
    assert (device.device, device.read_bytes, device.written_bytes) == ((8, 0), 10, 20)
    assert (device.reads, device.writes) == (1, 2)
    files.close()


def test_hugetlb(tmp_path: Path) -> None:
    (tmp_path / "hugetlb.2MB.usage_in_bytes").write_text("4194304\n")
    (tmp_path / "hugetlb.2MB.max_usage_in_bytes").write_text("6291456\n")
    files = ControlFiles({"hugetlb": str(tmp_path)})
    (found,) = v1.hugetlb(files, ["2MB"])
    assert (found.page_size, found.usage_bytes, found.max_usage_bytes) == ("2MB", 4 << 20, 6 << 20)
    files.close()
