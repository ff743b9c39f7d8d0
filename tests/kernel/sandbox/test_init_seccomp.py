"""Seccomp filters on real processes."""

import base64
import json
from typing import Any

import pytest

from nodeagent.linux import capabilities
from nodeagent.sandbox.seccomp import profile as seccomp_profile
from tests.kernel.sandbox.conftest import Plan
from tests.kernel.sandbox.containers import DEFAULT_CAPABILITIES, run, start, user

DEFAULT = seccomp_profile.runtime_default(capabilities.mask(DEFAULT_CAPABILITIES))
SECCOMP_FIELDS = ["/bin/grep", "^Seccomp", "/proc/self/status"]


def settings(found: seccomp_profile.Filter, **changes: Any) -> dict[str, Any]:
    encoded = base64.b64encode(found.program).decode()
    return {"seccomp": encoded, "seccomp_flags": found.flags, **changes}


def profile(**syscalls: str) -> seccomp_profile.Filter:
    rules = [{"names": [name], "action": action} for name, action in syscalls.items()]
    text = json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules})
    return seccomp_profile.from_json(text.encode(), 0)


@pytest.mark.parametrize("uid", [0, 1000])
@pytest.mark.parametrize("no_new_privs", [False, True])
def test_the_default_profile_is_on(plan: Plan, uid: int, no_new_privs: bool) -> None:
    process = settings(DEFAULT, user=user(uid=uid), no_new_privs=no_new_privs)
    output = run(plan(SECCOMP_FIELDS, process=process))[1]
    assert output == "Seccomp:\t2\nSeccomp_filters:\t1\n"


@pytest.mark.parametrize("uid", [0, 1000])
def test_the_filter_leaves_no_capability_behind(plan: Plan, uid: int) -> None:
    """SYS_ADMIN is kept until execve to install it."""
    command = ["/bin/grep", "^Cap[PEBA]", "/proc/self/status"]
    made = plan(command, process=settings(DEFAULT, user=user(uid=uid)))
    filtered = run(made)[1]
    made["process"]["seccomp"] = ""
    assert filtered == run(made)[1]


def test_a_program_works_under_the_default_profile(plan: Plan) -> None:
    script = "id > /tmp/x && cat /tmp/x && mknod /tmp/n c 1 3 && chown 5 /tmp/x && (sleep 0 & wait) && ps"
    code, output = run(plan(script, process=settings(DEFAULT)))
    assert code == 0, output


def test_mount_is_refused_under_the_default_profile(plan: Plan) -> None:
    held = capabilities.mask(DEFAULT_CAPABILITIES) | capabilities.SYS_ADMIN
    sets = dict.fromkeys(("bounding", "permitted", "effective"), held) | {
        "inheritable": 0,
        "ambient": 0,
    }
    script = "mount -t tmpfs none /tmp && echo mounted"
    assert run(plan(script, process={"capabilities": sets}))[1] == "mounted\n"
    assert run(plan(script, process=settings(DEFAULT, capabilities=sets)))[0] != 0


def test_a_profile_that_denies_one_call(plan: Plan) -> None:
    made = plan(
        "chmod 700 /tmp; echo $?",
        process=settings(profile(chmod="SCMP_ACT_ERRNO", fchmodat="SCMP_ACT_ERRNO")),
    )
    output = run(made)[1]
    assert "Operation not permitted" in output
    assert output.endswith("\n1\n")


def test_a_profile_that_allows_next_to_nothing_still_starts_the_program(plan: Plan) -> None:
    """The filter is the last thing before execve: the runtime needs nothing else of it."""
    text = {
        "defaultAction": "SCMP_ACT_KILL_PROCESS",
        "syscalls": [{"names": ["execve", "exit_group"], "action": "SCMP_ACT_ALLOW"}],
    }
    made = plan(
        ["/bin/true"], process=settings(seccomp_profile.from_json(json.dumps(text).encode(), 0))
    )
    with start(made) as process:
        assert process.ready
        assert process.go() == ""
        assert process.wait() == -31  # SIGSYS, in the program


def test_a_profile_that_forbids_execve_is_reported(plan: Plan) -> None:
    made = plan(["/bin/true"], process=settings(profile(execve="SCMP_ACT_ERRNO")))
    with start(made) as process:
        assert process.go() == 'exec "/bin/true": operation not permitted'


def test_a_filter_that_is_none_is_reported(plan: Plan) -> None:
    made = plan(["/bin/true"], process={"seccomp": base64.b64encode(b"nonsense" * 2).decode()})
    with start(made) as process:
        assert "seccomp" in process.go()
