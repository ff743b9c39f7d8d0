"""What depends on the kernel, on machines of their own, which have cgroup v2 alone: the same tests as here.

The drivers: cgroupfs where the tests are alone with the kernel, systemd beside a systemd, as most users have it. One
kernel enforces a policy of SELinux. The machines run side by side, since they wait more than they compute.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import IN_CI, PROJECT
from tests.guest import policy, setup

SECONDS = 2400
SYSTEMD = [Path("/lib/systemd/systemd"), Path("/usr/bin/dbus-daemon"), Path("/usr/bin/busctl")]


@dataclass(frozen=True, slots=True)
class Case:
    """Tests for one guest, and the guest's `init` and `security` (tests.guest.machine.Guest)."""

    suites: tuple[str, ...]
    init: str = "none"
    security: str = "apparmor"


CASES = {
    "suites": Case(
        (
            "tests/contract/cgroups",
            "tests/kernel/cgroups",
            "tests/kernel/sandbox",
            "tests/e2e/test_lifecycle.py",
            "tests/e2e/test_logs_and_exec.py",
            "tests/e2e/test_recovery.py",
            "tests/e2e/test_resources.py",
            "tests/chaos/gray/test_time_and_pids.py",
        )
    ),
    "security": Case(
        (
            "tests/security/agent/test_apparmor.py",
            "tests/security/agent/test_cgroups.py",
            "tests/security/agent/test_local_users.py",
            "tests/security/agent/test_pod_files.py",
            "tests/security/agent/test_visible_processes.py",
            "tests/security/test_log_pump.py",
            "tests/security/test_network_spoofing.py",
        )
    ),
    "systemd": Case(
        ("tests/kernel/cgroups/test_systemd.py", "tests/charts", "tests/kubelet"), init="systemd"
    ),
    "selinux": Case(
        ("tests/e2e/test_selinux.py", "tests/charts/test_charts.py::test_chart[cilium-agent]"),
        security="selinux",
    ),
}


@dataclass(frozen=True, slots=True)
class Run:
    """A guest that runs its tests. output: what they print."""

    process: subprocess.Popen[bytes]
    output: Path


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Run]]:
    """Every guest that this session has a test for, and that this machine can boot."""
    folder = tmp_path_factory.mktemp("guests")
    started: dict[str, Run] = {}
    try:
        for item in request.session.items:
            if isinstance(item, pytest.Function) and item.path == request.path:
                name = str(item.callspec.params["name"])
                if not lacking(CASES[name]):
                    started[name] = start(CASES[name], folder / name)
        yield started
    finally:
        for run in started.values():
            run.process.terminate()
            run.process.wait()


def start(case: Case, output: Path) -> Run:
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not guest"]
    command = [sys.executable, "-m", "tests.guest", "--memory", "4096", "--timeout", str(SECONDS)]
    command += ["--init", case.init, "--security", case.security]
    if IN_CI:  # there, what is not built fails
        command += ["--env", f"CI={os.environ['CI']}"]
    command += [str(PROJECT), "--"]
    if case.security == "selinux":
        command += [str(policy.LOADER), str(policy.compiled())]
    with output.open("wb") as file:
        process = subprocess.Popen(
            [*command, *tests, *case.suites],
            cwd=PROJECT,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
    return Run(process, output)


def lacking(case: Case) -> str:
    """What this machine lacks to boot the guest, and the remedy."""
    if not setup.is_prepared("uml"):
        return "the guest's kernel is not there: `make guest` unpacks it"
    if case.security == "selinux" and not policy.is_prepared():
        return "the compiler of the guest's policy is not there: `make guest` unpacks it"
    if case.init == "systemd" and (missing := [path for path in SYSTEMD if not path.exists()]):
        return f"the guest has this machine's programs, among which {missing[0]} is not"
    return ""


@pytest.mark.guest
@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("name", CASES)
def test_suites_pass_in_a_guest(name: str, runs: dict[str, Run]) -> None:
    if message := lacking(CASES[name]):
        pytest.fail(message) if IN_CI else pytest.skip(message)
    status = runs[name].process.wait()
    print(runs[name].output.read_text(errors="replace"))
    assert status == 0
