"""What depends on cgroups, on a machine of its own, whose kernel has cgroup v2 alone: the same tests as here."""

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
CHARTS = ["tests/charts"]
SECONDS = 2400


@pytest.fixture
def guest() -> machine.Guest:
    if not setup.is_prepared("uml"):
        message = "the guest's kernel is not there: `make guest` unpacks it"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return machine.Guest(kernel="uml", memory_mib=4096, timeout_seconds=SECONDS)


@pytest.mark.guest
@pytest.mark.timeout(SECONDS + 30)
@pytest.mark.parametrize("suites", [SUITES, SECURITY, CHARTS], ids=["suites", "security", "charts"])
def test_suites_pass_on_cgroup_v2(guest: machine.Guest, suites: list[str]) -> None:
    pytest_command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not guest"]
    assert machine.run(guest, [*pytest_command, *suites], PROJECT, {}) == 0
