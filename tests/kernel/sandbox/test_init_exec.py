"""Further processes of a running container."""

import base64
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nodeagent.linux import capabilities, syscalls
from nodeagent.sandbox.seccomp import profile as seccomp_profile
from nodeagent.sandbox.spec import ContainerPlan
from tests.kernel.sandbox.conftest import Plan
from tests.kernel.sandbox.containers import (
    DEFAULT_CAPABILITIES,
    Process,
    exec_plan,
    process_plan,
    start,
    start_exec,
    user,
)

_FILTER = seccomp_profile.runtime_default(capabilities.mask(DEFAULT_CAPABILITIES))
SECCOMP = base64.b64encode(_FILTER.program).decode()
WAITING = "touch /tmp/up; exec sleep 100"


@pytest.fixture
def container(plan: Plan) -> Iterator[Process]:
    with running(plan(WAITING)) as process:
        yield process


def running(plan: ContainerPlan) -> Process:
    process = start(plan)
    assert process.go() == ""
    return process


def execute(container: Process, command: str | list[str], **changes: Any) -> tuple[int, str]:
    argv = ["/bin/sh", "-c", command] if isinstance(command, str) else command
    with start_exec(container, exec_plan(argv), process_plan(**changes)) as process:
        assert process.ready
        assert process.go() == ""
        output = process.output()
        return process.wait(), output


def test_it_sees_the_containers_files(container: Process) -> None:
    assert execute(container, "ls /tmp; exit 7") == (7, "up\n")


def test_it_is_in_the_containers_namespaces(container: Process) -> None:
    for name in ("mnt", "cgroup"):
        ours = os.readlink(f"/proc/self/ns/{name}")
        path = f"/proc/{container.pid}/ns/{name}"
        settings = process_plan()
        with start_exec(container, exec_plan(["/bin/sleep", "9"]), settings) as process:
            process.go()
            assert os.readlink(f"/proc/{process.pid}/ns/{name}") == os.readlink(path) != ours


def test_identity_environment_and_directory(container: Process) -> None:
    script = "id -u; id -G; pwd; echo $HOME $X"
    changes = {"user": user(username="app"), "cwd": "/tmp", "env": ["X=1"]}
    assert execute(container, script, **changes) == (0, "1000\n1000 44\n/tmp\n/home/app 1\n")


def test_privileges(container: Process) -> None:
    mask = capabilities.mask(DEFAULT_CAPABILITIES)
    _, output = execute(container, ["/bin/grep", "^CapEff", "/proc/self/status"])
    assert output == f"CapEff:\t{mask:016x}\n"


def test_a_missing_program_is_reported(container: Process) -> None:
    with start_exec(container, exec_plan(["/bin/nope"]), process_plan()) as process:
        assert process.go() == 'exec "/bin/nope": no such file or directory'


def test_a_container_that_has_just_ended(container: Process) -> None:
    os.kill(container.pid, signal.SIGKILL)
    container.wait()
    plan = exec_plan(["/bin/true"])
    with start_exec(container, plan, process_plan(), hidden=True) as process:
        assert process.message["error"] == "FailedPrecondition"
        assert "has just ended" in process.message["text"]


def test_a_missing_working_directory_is_not_made(container: Process) -> None:
    with start_exec(container, exec_plan(["/bin/true"]), process_plan(cwd="/absent")) as process:
        assert process.message["error"] == "FailedPrecondition"
        assert "/absent" in process.message["text"]
    assert execute(container, "ls -d /absent")[0] == 1


def test_a_terminal(container: Process) -> None:
    with start_exec(container, exec_plan(["/bin/tty"], tty=True), process_plan()) as process:
        assert process.master != -1
        process.go()
        assert process.output() == "/dev/pts/0\r\n"


# ---- hidden until they execute their program ----


def execute_hidden(container: Process, script: str, **changes: Any) -> tuple[int, str]:
    wanted = exec_plan(["/bin/sh", "-c", script])
    with start_exec(container, wanted, process_plan(**changes), hidden=True) as process:
        assert process.ready
        process.follow()
        assert process.go() == ""
        output = process.output()
        return process.wait(), output


def test_a_hidden_process_is_not_in_the_container(container: Process) -> None:
    with start_exec(container, exec_plan(["/bin/true"]), process_plan(), hidden=True) as process:
        assert process.ready
        assert os.readlink(f"/proc/{process.pid}/ns/pid") == os.readlink("/proc/self/ns/pid")
        process.follow()  # its successor is ours to reap, or the container's end waits for that


def test_its_successor_is_and_has_only_the_programs_rights(container: Process) -> None:
    mask = capabilities.mask(DEFAULT_CAPABILITIES)
    with start_exec(
        container, exec_plan(["/bin/sleep", "9"]), process_plan(), hidden=True
    ) as process:
        process.follow()
        namespaces = {os.readlink(f"/proc/{pid}/ns/pid") for pid in (process.pid, container.pid)}
        assert len(namespaces) == 1
        status = Path(f"/proc/{process.pid}/status").read_text()
        for name in ("CapPrm", "CapEff", "CapBnd"):
            assert f"{name}:\t{mask:016x}\n" in status
        assert os.stat(f"/proc/{process.pid}/fd").st_uid == 0  # not to be looked into
        assert process.go() == ""


def test_a_successor_runs_the_program(container: Process) -> None:
    script = "cat /proc/self/stat; id -u; exit 5"
    code, output = execute_hidden(container, script, user=user(uid=1000))
    assert code == 5
    stat, uid = output.splitlines()
    assert 1 < int(stat.split()[0]) < 50
    assert uid == "1000"


def test_a_successor_that_cannot_start_says_so(container: Process) -> None:
    with start_exec(container, exec_plan(["/bin/nope"]), process_plan(), hidden=True) as process:
        process.follow()
        assert process.go() == 'exec "/bin/nope": no such file or directory'
        assert process.wait() == 1


@pytest.mark.parametrize("no_new_privs", [False, True])
def test_a_successor_under_the_default_filter(container: Process, no_new_privs: bool) -> None:
    changes = {"seccomp": SECCOMP, "no_new_privs": no_new_privs}
    script = "grep ^Seccomp: /proc/self/status"
    assert execute_hidden(container, script, **changes) == (0, "Seccomp:\t2\n")


def test_a_terminal_of_a_successor(container: Process) -> None:
    wanted = exec_plan(["/bin/tty"], tty=True)
    with start_exec(container, wanted, process_plan(), hidden=True) as process:
        process.follow()
        process.go()
        assert process.output() == "/dev/pts/0\r\n"


# ---- containers that lay traps for their execs ----


def trap(plan: Plan, script: str) -> Process:
    """A container of root with every capability it can have, that has run `script`."""
    _, held, _ = syscalls.capget()
    sets = dict.fromkeys(("bounding", "permitted", "effective"), held) | {
        "inheritable": 0,
        "ambient": 0,
    }
    return running(plan(f"{script}; echo set; exec sleep 100", process={"capabilities": sets}))


@pytest.mark.parametrize(
    "script",
    [
        "mount -t tmpfs none /dev; mkdir /dev/pts; echo > /dev/pts/ptmx",
        "umount /dev/pts; mkfifo /dev/pts/ptmx",
        "umount /dev/pts; ln -s /dev/null /dev/pts/ptmx",
        "umount /dev/pts; mknod /dev/pts/ptmx c 5 2",
        "umount /dev/pts",
    ],
)
def test_no_terminal_comes_from_what_is_no_devpts(plan: Plan, script: str) -> None:
    with trap(plan, script) as container:
        assert os.read(container.stdout, 100).endswith(b"set\n")
        with start_exec(container, exec_plan(["/bin/tty"], tty=True), process_plan()) as process:
            assert process.message["error"] == "FailedPrecondition"
            assert "/dev/pts/ptmx" in process.message["text"]


@pytest.mark.parametrize(
    "script",
    [
        "rm /dev/null; echo > /dev/null",
        "rm /dev/null; mkfifo /dev/null",
        "rm /dev/null; mknod /dev/null c 1 5",
        "rm /dev/null; ln -s /dev/zero /dev/null",
    ],
)
def test_no_stdin_comes_from_what_is_no_null_device(plan: Plan, script: str) -> None:
    with trap(plan, script) as container:
        assert os.read(container.stdout, 100).endswith(b"set\n")
        with start_exec(container, exec_plan(["/bin/cat"]), process_plan()) as process:
            assert process.message["error"] == "FailedPrecondition"
            assert "/dev/null" in process.message["text"]
