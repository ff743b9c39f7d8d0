"""Limits: written, read back, enforced, and all of them or none."""

import os
import subprocess
from pathlib import Path

import pytest

from nodeagent.cgroups.group import Cgroup
from nodeagent.cgroups.hierarchy import Layout
from nodeagent.cgroups.manager import HUGEPAGES, Cgroups
from nodeagent.errors import (
    FailedPrecondition,
    InvalidArgument,
    NodeAgentError,
    NotFound,
    Unsupported,
)
from nodeagent.requests import Resources
from tests.contract.cgroups.conftest import TOP, Spawn, close, in_force

MIB = 1 << 20

HOG = f"x = bytearray(60 * {MIB}); x[::4096] = b'x' * len(x[::4096]); print('ready', flush=True); input()"


def ready(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout
    return process.stdout.readline()


def has_swap_accounting(group: Cgroup) -> bool:
    group.apply(Resources(memory_limit_bytes=MIB, memory_swap_limit_bytes=MIB))
    return in_force(group).memory_swap_limit_bytes == MIB


def test_without_limits(group: Cgroup) -> None:
    found = in_force(group)
    assert (found.memory_limit_bytes, found.memory_swap_limit_bytes) == (-1, -1)
    assert (found.cpu_quota_usec, found.cpu_period_usec, found.pids_limit) == (-1, 100_000, -1)
    assert found.cpu_shares == pytest.approx(1024, abs=10)
    assert found.hugepage_limits == {}


def test_read_back(group: Cgroup) -> None:
    group.apply(
        Resources(
            cpu_shares=512,
            cpu_quota_usec=20_000,
            cpu_period_usec=50_000,
            memory_limit_bytes=64 * MIB,
            pids_limit=100,
        )
    )
    found = in_force(group)
    assert (found.cpu_quota_usec, found.cpu_period_usec) == (20_000, 50_000)
    assert found.cpu_shares == pytest.approx(512, abs=10)
    assert (found.memory_limit_bytes, found.pids_limit) == (64 * MIB, 100)


def test_what_is_not_set_stays(group: Cgroup) -> None:
    group.apply(Resources(memory_limit_bytes=64 * MIB, cpu_quota_usec=20_000, pids_limit=9))
    group.apply(Resources(cpu_period_usec=200_000))
    found = in_force(group)
    assert (found.memory_limit_bytes, found.pids_limit) == (64 * MIB, 9)
    assert (found.cpu_quota_usec, found.cpu_period_usec) == (20_000, 200_000)


def test_limits_are_lifted(group: Cgroup) -> None:
    before = in_force(group)
    group.apply(Resources(memory_limit_bytes=64 * MIB, cpu_quota_usec=20_000, pids_limit=9))
    group.apply(
        Resources(
            memory_limit_bytes=-1, memory_swap_limit_bytes=-1, cpu_quota_usec=-1, pids_limit=-1
        )
    )
    assert in_force(group) == before


def test_memory_and_swap_up_and_down(group: Cgroup) -> None:
    if not has_swap_accounting(group):
        pytest.skip("this kernel does not account swap")
    for memory, both in [(64, 64), (128, 200), (300, 300), (32, 40), (32, 32), (64, 100), (16, 99)]:
        wanted = Resources(memory_limit_bytes=memory * MIB, memory_swap_limit_bytes=both * MIB)
        group.apply(wanted)
        found = in_force(group)
        assert (found.memory_limit_bytes, found.memory_swap_limit_bytes) == (
            memory * MIB,
            both * MIB,
        )


def test_a_memory_limit_alone_leaves_the_swap_that_may_be_used(group: Cgroup) -> None:
    if not has_swap_accounting(group):
        pytest.skip("this kernel does not account swap")
    group.apply(Resources(memory_limit_bytes=64 * MIB, memory_swap_limit_bytes=80 * MIB))
    for memory in (128, 32):
        group.apply(Resources(memory_limit_bytes=memory * MIB))
        assert in_force(group).memory_swap_limit_bytes == (memory + 16) * MIB


def test_cpuset(group: Cgroup, cgroups: Cgroups) -> None:
    if "cpuset" not in cgroups.controllers:
        with pytest.raises(Unsupported, match=r"cpuset\.cpus"):
            group.apply(Resources(cpuset_cpus="0"))
        return
    group.apply(Resources(cpuset_cpus="0", cpuset_mems="0"))
    assert (in_force(group).cpuset_cpus, in_force(group).cpuset_mems) == ("0", "0")
    with pytest.raises(NodeAgentError, match=r"cpuset\.cpus"):
        group.apply(Resources(cpuset_cpus="60000"))
    assert in_force(group).cpuset_cpus == "0"


def test_a_cpuset_is_set_back(group: Cgroup, cgroups: Cgroups) -> None:
    if "cpuset" not in cgroups.controllers:
        pytest.skip("no cpuset here")
    before = in_force(group)
    with pytest.raises(NodeAgentError, match=r"cpuset\.mems"):
        group.apply(Resources(cpuset_cpus="0", cpuset_mems="60000"))
    assert in_force(group) == before


def test_all_or_nothing(group: Cgroup) -> None:
    group.apply(Resources(memory_limit_bytes=64 * MIB, cpu_quota_usec=20_000, cpu_shares=512))
    before = in_force(group)
    with pytest.raises(Unsupported, match=r"hugetlb\.3MB"):
        group.apply(
            Resources(
                memory_limit_bytes=32 * MIB,
                memory_swap_limit_bytes=48 * MIB,
                cpu_quota_usec=10_000,
                cpu_period_usec=50_000,
                cpu_shares=2048,
                hugepage_limits={"3MB": 3 * MIB},
            )
        )
    assert in_force(group) == before


def test_nonsense_is_refused_before_anything_is_written(group: Cgroup) -> None:
    before = in_force(group)
    with pytest.raises(InvalidArgument, match="cpu_period_usec"):
        group.apply(Resources(memory_limit_bytes=64 * MIB, cpu_period_usec=1))
    assert in_force(group) == before


def test_no_huge_pages_can_always_be_asked_for(group: Cgroup) -> None:
    group.apply(Resources(hugepage_limits={"2MB": 0, "1GB": 0, "16GB": 0}))


def test_huge_pages(group: Cgroup, cgroups: Cgroups, layout: Layout) -> None:
    sizes = os.listdir(HUGEPAGES) if "hugetlb" in cgroups.controllers else []
    if "hugepages-2048kB" not in sizes:
        with pytest.raises(Unsupported, match=r"hugetlb\.2MB"):
            group.apply(Resources(hugepage_limits={"2MB": 4 * MIB}))
        return
    group.apply(Resources(hugepage_limits={"2MB": 4 * MIB}))
    kept = [h.directory(group.path) for h in layout.hierarchies if "hugetlb" in h.controllers]
    name = "hugetlb.2MB.max" if layout.kind == "v2" else "hugetlb.2MB.limit_in_bytes"
    assert Path(kept[0], name).read_text() == f"{4 * MIB}\n"
    assert "2MB" in [size.page_size for size in group.stats().hugetlb]


def test_unified(group: Cgroup, cgroups: Cgroups) -> None:
    wanted = Resources(
        memory_limit_bytes=64 * MIB,
        unified={
            "memory.max": f"{32 * MIB}",
            "memory.high": f"{16 * MIB}",
            "memory.oom.group": "1",
        },
    )
    if cgroups.hierarchy != "v2":
        with pytest.raises(Unsupported, match=r"memory\.high"):
            group.apply(wanted)
        return
    group.apply(wanted)
    found = in_force(group)
    assert found.memory_limit_bytes == 32 * MIB
    assert found.unified["memory.high"] == f"{16 * MIB}"
    assert found.unified["memory.oom.group"] == "1"
    with pytest.raises(Unsupported, match=r"memory\.nonsense"):
        group.apply(Resources(unified={"memory.high": "max", "memory.nonsense": "1"}))
    with pytest.raises(InvalidArgument, match=r'memory\.high: cannot write "much"'):
        group.apply(Resources(unified={"memory.high": "much"}))
    assert in_force(group) == found


def test_a_group_that_has_gone(group: Cgroup) -> None:
    group.remove()
    with pytest.raises(NotFound):
        group.apply(Resources(pids_limit=1))
    with pytest.raises(NotFound):
        in_force(group)


# --- enforced ---


def test_a_memory_limit_below_the_usage_is_refused(group: Cgroup, spawn: Spawn) -> None:
    group.apply(Resources(memory_limit_bytes=100 * MIB, pids_limit=50))
    process = spawn(group, HOG)
    assert ready(process) == b"ready\n"
    with pytest.raises(FailedPrecondition, match=rf'cannot write "{10 * MIB}"'):
        group.apply(Resources(memory_limit_bytes=10 * MIB, pids_limit=60))
    assert in_force(group).memory_limit_bytes == 100 * MIB
    assert in_force(group).pids_limit == 50
    assert process.poll() is None


def test_a_memory_limit_below_the_page_cache_is_taken(
    group: Cgroup, spawn: Spawn, tmp_path: os.PathLike[str]
) -> None:
    file = os.path.join(tmp_path, "data")
    code = (
        f"f = open({file!r}, 'wb'); f.write(b'x' * (40 << 20)); f.flush()\n"
        "import os; os.fsync(f.fileno()); print('ready', flush=True); input()"
    )
    process = spawn(group, code)
    assert ready(process) == b"ready\n"
    group.apply(Resources(memory_limit_bytes=20 * MIB))
    assert in_force(group).memory_limit_bytes == 20 * MIB
    assert process.poll() is None


def test_memory_is_limited(group: Cgroup, layout: Layout, spawn: Spawn) -> None:
    group.apply(Resources(memory_limit_bytes=20 * MIB, memory_swap_limit_bytes=20 * MIB))
    watch = group.watch_fds()
    try:
        assert watch.oom is not None
        assert b"oom_kill 0" in os.pread(watch.oom, 4096, 0)
        assert spawn(group, HOG).wait(10) == -9
        assert b"oom_kill 1" in os.pread(watch.oom, 4096, 0)
    finally:
        close(watch)
    memory = group.stats().memory
    assert memory
    assert (memory.oom_kills, memory.limit_bytes) == (1, 20 * MIB)
    assert (
        memory.failures > 0 or layout.legacy
    )  # Linux 6.18 counts none at memory.memsw.limit_in_bytes


def test_processes_are_limited(group: Cgroup, spawn: Spawn) -> None:
    group.apply(Resources(pids_limit=1))
    process = spawn(group, "import os\ntry: os.fork()\nexcept BlockingIOError: print('refused')")
    assert process.communicate()[0] == b"refused\n"


def test_cpu_is_limited(group: Cgroup, spawn: Spawn) -> None:
    group.apply(Resources(cpu_period_usec=10_000, cpu_quota_usec=1_000))
    spawn(group, "import time; t = time.time()\nwhile time.time() < t + 0.3: pass").wait(10)
    cpu = group.stats().cpu
    assert cpu
    assert cpu.throttled_periods > 5
    assert cpu.throttled_ns > 50_000_000
    assert cpu.usage_ns < 2 * cpu.periods * 1_000_000  # of a period, a tenth


def test_a_quota_within_the_parents(cgroups: Cgroups, layout: Layout) -> None:
    """v1 refuses a child that may use more than its parent, also while period and quota change one after the other."""
    parent = cgroups.create(f"{TOP}/pod", Resources(cpu_quota_usec=50_000, cpu_period_usec=100_000))
    child = cgroups.create(
        f"{TOP}/pod/one", Resources(cpu_quota_usec=50_000, cpu_period_usec=100_000)
    )
    child.apply(Resources(cpu_quota_usec=5_000, cpu_period_usec=10_000))
    child.apply(Resources(cpu_quota_usec=500_000, cpu_period_usec=1_000_000))
    assert in_force(child).cpu_quota_usec == 500_000
    if layout.legacy:
        with pytest.raises(InvalidArgument, match=r"cpu\.cfs_quota_us"):
            child.apply(Resources(cpu_quota_usec=600_000, cpu_shares=77))
        assert in_force(child).cpu_quota_usec == 500_000
    child.remove()
    parent.remove()
