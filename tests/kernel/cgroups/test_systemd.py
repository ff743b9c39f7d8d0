"""The systemd driver beside a real systemd, with slices as the kubelet makes them."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from nodeagent.cgroups import systemd
from nodeagent.cgroups.devices import DEFAULT_RULES
from nodeagent.cgroups.group import Cgroup
from nodeagent.cgroups.manager import Cgroups
from nodeagent.requests import Resources
from tests.contract.cgroups.conftest import in_force

pytestmark = pytest.mark.skipif(
    not systemd.manages_node(), reason="systemd is not the init of this machine"
)

TOP = f"natest{os.getpid()}"
POD = f"{TOP}-pod1.slice"
MIB = 1 << 20
LIMITS = Resources(memory_limit_bytes=64 * MIB, cpu_shares=512, cpu_quota_usec=50_000, pids_limit=9)


def systemctl(*arguments: str) -> None:
    subprocess.run(["systemctl", *arguments], check=True, timeout=60)


@pytest.fixture
def pod() -> Iterator[str]:
    """The slice of a pod, with the accounting that the kubelet asks for."""
    systemctl("start", POD)
    accounting = [f"{name}Accounting=yes" for name in ("Memory", "CPU", "Tasks", "IO")]
    systemctl("set-property", "--runtime", POD, *accounting)
    yield systemd.expand_slice(f"/{POD}")
    systemctl("stop", f"{TOP}.slice")
    systemctl("revert", POD)


@pytest.fixture
def group(pod: str) -> Iterator[Cgroup]:
    """A container that runs."""
    cgroups = Cgroups.open(driver="auto", default_parent="/natest")
    assert cgroups.driver == "systemd"
    group = cgroups.create(cgroups.container_path(pod, "0" * 64), LIMITS)
    group.set_devices(DEFAULT_RULES)
    process = subprocess.Popen(["sleep", "600"])
    with open(f"/sys/fs/cgroup{group.path}/cgroup.procs", "w", encoding="ascii") as file:
        file.write(str(process.pid))
    yield group
    group.kill()
    process.wait()
    group.remove()
    assert not os.path.exists(f"/sys/fs/cgroup{os.path.dirname(group.path)}")


def reads_kmsg(group: Cgroup) -> bool:
    procs = f"/sys/fs/cgroup{group.path}/cgroup.procs"
    script = f"echo $$ > {procs}; exec head -c0 /dev/kmsg"
    return (
        subprocess.run(["sh", "-c", script], check=False, stderr=subprocess.DEVNULL).returncode == 0
    )


CHANGES: list[tuple[str, Callable[[], None]]] = [
    ("reload", lambda: systemctl("daemon-reload")),
    ("reexec", lambda: systemctl("daemon-reexec")),
    ("resize", lambda: systemctl("set-property", "--runtime", POD, "MemoryMax=1G", "CPUWeight=7")),
    (
        "scope beside",
        lambda: subprocess.run(
            ["systemd-run", "--quiet", "--scope", f"--slice={POD}", "-p", "MemoryMax=20M", "true"],
            check=True,
        ).check_returncode(),
    ),
    ("stop", lambda: systemctl("stop", POD)),
]


@pytest.mark.parametrize("change", [c for _, c in CHANGES], ids=[name for name, _ in CHANGES])
def test_limits_and_device_rules_survive(group: Cgroup, change: Callable[[], None]) -> None:
    before = in_force(group)
    assert (before.memory_limit_bytes, before.pids_limit) == (64 * MIB, 9)
    change()
    time.sleep(0.3)  # systemd realizes cgroups after it has answered
    assert in_force(group) == before
    assert len(group.processes()) == 1
    assert not reads_kmsg(group)
    group.apply(Resources(memory_limit_bytes=32 * MIB))
    assert in_force(group).memory_limit_bytes == 32 * MIB


def test_a_slice_without_a_unit() -> None:
    """A slice that crictl asks for: nobody told systemd."""
    cgroups = Cgroups.open(driver="systemd", default_parent="/natest")
    group = cgroups.create(cgroups.container_path("/natest.slice", "x"), LIMITS)
    systemctl("daemon-reload")
    time.sleep(0.3)
    assert in_force(group).memory_limit_bytes == 64 * MIB
    group.remove()
    assert not os.path.exists("/sys/fs/cgroup/natest.slice")
