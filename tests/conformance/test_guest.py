"""The specs that load AppArmor profiles, on a machine of their own; its kernel has cgroup v2, too."""

import sys

import pytest

from tests.conftest import IN_CI
from tests.guest import machine, setup
from tests.support.images import PROJECT

SECONDS = 900


@pytest.mark.guest
@pytest.mark.timeout(SECONDS + 30)
@pytest.mark.usefixtures("critest")
def test_apparmor() -> None:
    if not setup.is_prepared("uml"):
        message = "the guest's kernel is not there: `make guest` unpacks it"
        pytest.fail(message) if IN_CI else pytest.skip(message)
    guest = machine.Guest(kernel="uml", timeout_seconds=SECONDS)
    command = [sys.executable, "-m", "tests.conformance", "--focus", "AppArmor"]
    assert machine.run(guest, command, PROJECT, {}) == 0
