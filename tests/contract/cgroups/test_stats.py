"""Accounting of what processes really do."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from nodeagent.cgroups.group import Cgroup
from nodeagent.cgroups.hierarchy import Layout
from nodeagent.cgroups.manager import Cgroups
from nodeagent.errors import NotFound
from nodeagent.requests import Resources
from tests.contract.cgroups.conftest import TOP, Spawn

MIB = 1 << 20


def ready(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout
    assert process.stdout.readline() == b"ready\n"


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_an_empty_group(group: Cgroup) -> None:
    before = time.time_ns()
    stats = group.stats()
    assert before <= stats.at_ns <= time.time_ns()
    assert stats.cpu
    assert stats.memory
    assert stats.pids
    assert (stats.cpu.usage_ns, stats.cpu.periods, stats.pids.current) == (0, 0, 0)
    assert stats.memory.rss_bytes == 0
    assert (stats.memory.limit_bytes, stats.memory.available_bytes) == (None, None)
    assert (stats.memory.swap_limit_bytes, stats.pids.limit) == (None, None)
    assert stats.hugetlb == () or stats.hugetlb[0].usage_bytes == 0


def test_cpu(group: Cgroup, layout: Layout, spawn: Spawn) -> None:
    spawn(
        group, "import time; t = time.process_time()\nwhile time.process_time() < t + 0.1: pass"
    ).wait(10)
    cpu = group.stats().cpu
    assert cpu
    assert 90_000_000 <= cpu.usage_ns < 2_000_000_000
    assert cpu.usage_ns == measured_ns(layout, group)
    # On v1 these are counted in ticks, at whose moments anybody may be running; of a wrong unit they would be far off.
    assert cpu.usage_ns / 20 < cpu.user_ns + cpu.system_ns < 20 * cpu.usage_ns


def measured_ns(layout: Layout, group: Cgroup) -> int:
    """The kernel's sum, in the file that has nothing else, or in that of v2."""
    for hierarchy in layout.legacy:
        if "cpuacct" in hierarchy.controllers:
            return int(Path(hierarchy.directory(group.path), "cpuacct.usage").read_text())
    assert layout.unified
    text = Path(layout.unified.directory(group.path), "cpu.stat").read_text()
    return int(text.split()[1]) * 1000


def test_memory(group: Cgroup, spawn: Spawn) -> None:
    group.apply(Resources(memory_limit_bytes=200 * MIB, memory_swap_limit_bytes=200 * MIB))
    ready(
        spawn(
            group,
            f"x = bytes(range(256)) * (40 * {MIB} // 256); print('ready', flush=True); input()",
        )
    )
    memory = group.stats().memory
    assert memory
    assert 40 * MIB <= memory.rss_bytes <= memory.usage_bytes < 100 * MIB
    assert memory.max_usage_bytes >= memory.usage_bytes - MIB
    assert memory.page_faults > 10
    assert memory.limit_bytes == 200 * MIB
    assert memory.available_bytes == 200 * MIB - memory.working_set_bytes
    assert memory.swap_limit_bytes in (0, None)
    assert (memory.oom_kills, memory.swap_bytes) == (0, 0)


def test_page_cache_is_not_in_the_working_set(
    group: Cgroup, spawn: Spawn, tmp_path: os.PathLike[str]
) -> None:
    file = os.path.join(tmp_path, "data")
    code = (
        f"import os; f = open({file!r}, 'wb'); f.write(b'x' * (30 << 20)); f.flush()\n"
        "os.fsync(f.fileno()); print('ready', flush=True); input()"
    )
    ready(spawn(group, code))
    memory = group.stats().memory
    assert memory
    assert memory.cache_bytes >= 30 * MIB
    assert memory.active_file_bytes + memory.inactive_file_bytes >= 29 * MIB
    assert memory.working_set_bytes == memory.usage_bytes - memory.inactive_file_bytes
    written = sum(device.written_bytes for device in group.stats().io)
    assert written == 0 or written >= 29 * MIB  # 0 where the file system has no block device


def test_pids(group: Cgroup, spawn: Spawn) -> None:
    group.apply(Resources(pids_limit=9))
    code = (
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "print('ready', flush=True); input()"
    )
    ready(spawn(group, code))
    pids = group.stats().pids
    assert pids
    assert (pids.current, pids.limit) == (2, 9)


def test_pressure_where_there_is_some(group: Cgroup, cgroups: Cgroups, spawn: Spawn) -> None:
    pressure = group.stats().pressure
    if cgroups.hierarchy == "v1" or not os.path.exists("/proc/pressure/cpu"):
        assert (pressure.cpu, pressure.memory, pressure.io) == (None, None, None)
        return
    assert pressure.cpu
    assert pressure.memory
    assert pressure.io
    burn = "import time; t = time.time()\nprint('ready', flush=True)\nwhile time.time() < t + 0.3: pass"
    started = [spawn(group, burn) for _ in range((os.cpu_count() or 1) + 1)]
    for process in started:
        process.wait(10)
    after = group.stats().pressure.cpu
    assert after
    assert after.some.total_usec > pressure.cpu.some.total_usec


def test_a_group_that_has_gone(group: Cgroup) -> None:
    group.stats()
    group.remove()
    with pytest.raises(NotFound, match="group"):
        group.stats()
    group.close()


def test_a_group_that_others_removed(cgroups: Cgroups) -> None:
    group, again = cgroups.create(f"{TOP}/x"), cgroups.open_existing(f"{TOP}/x")
    group.stats()
    again.remove()
    with pytest.raises(NotFound):
        group.stats()
    group.close()


def test_descriptors_are_kept_and_closed(group: Cgroup) -> None:
    before = open_files()
    group.stats()
    kept = open_files()
    group.stats()
    assert before < kept == open_files()
    group.close()
    assert open_files() == before
