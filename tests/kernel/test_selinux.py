"""Containers with labels of SELinux, on a machine of its own whose kernel enforces a policy."""

import os
import sys
from pathlib import Path

import pytest

from tests.guest import machine, policy, setup

PROJECT = Path(__file__).parents[2]
SUITES = ["tests/e2e/test_selinux.py", "tests/charts/test_charts.py::test_chart[cilium-agent]"]
SECONDS = 900


@pytest.mark.guest
@pytest.mark.timeout(SECONDS + 30)
def test_containers_are_confined_and_have_what_they_need() -> None:
    if not setup.is_prepared("uml") or not policy.is_prepared():
        message = "the guest's kernel, or the compiler of its policy, is not there: `make guest` unpacks both"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    guest = machine.Guest(security="selinux", memory_mib=4096, timeout_seconds=SECONDS)
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not guest", *SUITES]
    command = [str(policy.LOADER), str(policy.compiled()), *tests]
    assert machine.run(guest, command, PROJECT, {}) == 0
