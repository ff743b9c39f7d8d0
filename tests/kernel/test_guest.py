"""What depends on cgroups, on a machine of its own, whose kernel has cgroup v2 alone: the same tests as here.

The drivers: cgroupfs where the tests are alone with the kernel, systemd beside a systemd, as most users have it.
"""

import os
import sys
from pathlib import Path

import pytest

from tests.guest import machine, setup

PROJECT = Path(__file__).parents[2]
SUITES = [
    "tests/contract/cgroups",
    "tests/kernel/cgroups",
    "tests/kernel/sandbox",
    "tests/e2e/test_lifecycle.py",
    "tests/e2e/test_logs_and_exec.py",
    "tests/e2e/test_recovery.py",
    "tests/e2e/test_resources.py",
]
SECURITY = [
    "tests/security/agent/test_apparmor.py",
    "tests/security/agent/test_cgroups.py",
    "tests/security/agent/test_local_users.py",
    "tests/security/agent/test_pod_files.py",
    "tests/security/agent/test_visible_processes.py",
    "tests/security/test_log_pump.py",
    "tests/security/test_network_spoofing.py",
]
WITH_SYSTEMD = ["tests/kernel/cgroups/test_systemd.py", "tests/charts", "tests/kubelet"]
SYSTEMD = [Path("/lib/systemd/systemd"), Path("/usr/bin/dbus-daemon"), Path("/usr/bin/busctl")]
SECONDS = 2400


@pytest.mark.guest
@pytest.mark.timeout(SECONDS + 30)
@pytest.mark.parametrize(
    ("init", "suites"),
    [("none", SUITES), ("none", SECURITY), ("systemd", WITH_SYSTEMD)],
    ids=["suites", "security", "systemd"],
)
def test_suites_pass_on_cgroup_v2(init: str, suites: list[str]) -> None:
    if not setup.is_prepared("uml"):
        message = "the guest's kernel is not there: `make guest` unpacks it"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    if init == "systemd" and (lacking := [path for path in SYSTEMD if not path.exists()]):
        message = f"the guest has this machine's programs, among which {lacking[0]} is not"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    guest = machine.Guest(kernel="uml", init=init, memory_mib=4096, timeout_seconds=SECONDS)
    pytest_command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not guest"]
    strict = {"CI": os.environ["CI"]} if "CI" in os.environ else {}  # what is not built fails
    assert machine.run(guest, [*pytest_command, *suites], PROJECT, strict) == 0
