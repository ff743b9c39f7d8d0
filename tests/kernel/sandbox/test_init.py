"""A container's process from its birth to its program: namespaces, identity, privileges, what is left open."""

import os
import resource
import signal
from pathlib import Path

import pytest

from nodeagent.linux import capabilities
from nodeagent.sandbox.spec import Capabilities
from tests.kernel.sandbox.conftest import Plan
from tests.kernel.sandbox.containers import DEFAULT_CAPABILITIES, run, start, user


def capability_sets(mask: int, inheritable: int = 0, ambient: int = 0) -> Capabilities:
    return {
        "bounding": mask,
        "permitted": mask,
        "effective": mask,
        "inheritable": inheritable,
        "ambient": ambient,
    }


def status_field(name: str) -> str:
    return f"grep ^{name}: /proc/self/status"


def test_the_program_runs_with_its_environment(plan: Plan) -> None:
    code, output = run(plan("echo $GREETING $HOME; exit 3"))
    assert (code, output) == (3, "hello /root\n")


def test_it_is_the_first_process_of_its_own_session(plan: Plan) -> None:
    _, output = run(plan("echo $$; cat /proc/self/stat"))
    pid, stat = output.splitlines()
    assert pid == "1"
    assert stat.split()[5] == "1"  # session


def test_a_home_that_is_given_is_kept(plan: Plan) -> None:
    assert run(plan("echo $HOME", process={"env": ["HOME=/given", "HOME=/last"]}))[1] == "/last\n"


def test_bytes_of_any_kind_pass(plan: Plan) -> None:
    strange = os.fsdecode(b"\xff\xfe")
    made = plan(["/bin/sh", "-c", 'echo "$0$X"', strange], process={"env": [f"X={strange}"]})
    with start(made) as process:
        process.go()
        assert os.read(process.stdout, 100) == b"\xff\xfe\xff\xfe\n"


@pytest.mark.parametrize(
    ("env", "expected"),
    [(["PATH=/none:/bin"], "found\n"), (["PATH="], "found\n"), ([], "found\n")],
)
def test_the_program_is_searched_in_its_own_path(plan: Plan, env: list[str], expected: str) -> None:
    assert run(plan(["echo", "found"], process={"env": env}))[1] == expected


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["/bin/nope"], 'exec "/bin/nope": no such file or directory'),
        (["nope"], 'exec "nope": executable file not found in $PATH'),
        (["/etc/passwd"], 'exec "/etc/passwd": permission denied'),
        (["/tmp"], 'exec "/tmp": permission denied'),
        (["/etc/passwd/x"], 'exec "/etc/passwd/x": not a directory'),
    ],
)
def test_a_program_that_cannot_start_is_reported_after_go(
    plan: Plan, argv: list[str], text: str
) -> None:
    with start(plan(argv)) as process:
        assert process.ready
        assert process.go() == text
        assert process.wait() == 1


def test_without_go_nothing_runs(plan: Plan) -> None:
    with start(plan("echo ran")) as process:
        assert process.ready
        process.status.close()
        assert process.wait() == 1
        assert process.output() == ""


def test_only_the_standard_descriptors_are_left(plan: Plan) -> None:
    keep = os.open("/", os.O_RDONLY)
    os.set_inheritable(keep, True)
    try:
        _, output = run(plan(["/bin/ls", "/proc/self/fd"]))
    finally:
        os.close(keep)
    assert output.split() == ["0", "1", "2", "3"]  # 3 is the directory that ls reads


def test_stdin_defaults_to_the_containers_own_null(plan: Plan) -> None:
    _, output = run(plan("cat; readlink /proc/self/fd/0; stat -c %t:%T /dev/stdin -L"))
    assert output == "/dev/null\n1:3\n"


def test_stdin_is_what_is_given(plan: Plan) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"words")
    os.close(writer)
    try:
        assert run(plan("cat"), stdin=reader)[1] == "words"
    finally:
        os.close(reader)


def test_signals_are_as_after_boot(plan: Plan) -> None:
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        _, output = run(plan(["/bin/grep", "^Sig[BI]", "/proc/self/status"]))
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        signal.signal(signal.SIGTERM, previous)
    blocked, ignored = (int(line.split()[1], 16) for line in output.splitlines())
    of_the_c_library = 0b11 << 31  # 32 and 33, which it sets itself and lets nobody else set
    assert (blocked, ignored & ~of_the_c_library) == (0, 0)


# ---- identity ----


def test_identity_is_reported_and_real(plan: Plan) -> None:
    made = plan("id; cat /proc/self/status", process={"user": user(username="app", groups=[7])})
    with start(made) as process:
        assert process.ready["identity"] == {
            "uid": 1000,
            "gid": 1000,
            "groups": [7, 44, 1000],
            "home": "/home/app",
        }
        process.go()
        output = process.output()
    assert "uid=1000(app) gid=1000(app)" in output
    assert "Uid:\t1000\t1000\t1000\t1000" in output
    assert "Gid:\t1000\t1000\t1000\t1000" in output
    assert "Groups:\t7 44 1000 " in output


def test_an_unknown_user_is_not_found(plan: Plan) -> None:
    with start(plan("true", process={"user": user(username="ghost")})) as process:
        assert process.message["error"] == "NotFound"
        assert 'user "ghost"' in process.message["text"]


def test_an_ordinary_user_can_open_its_own_output_again(plan: Plan) -> None:
    made = plan("echo again > /dev/stdout", process={"user": user(uid=1000)})
    assert run(made) == (0, "again\n")


def test_umask_and_working_directory(plan: Plan) -> None:
    made = plan("touch x; stat -c %a:%U x; pwd", process={"umask": 0o077, "cwd": "/made/for/it"})
    assert run(made)[1] == "600:root\n/made/for/it\n"


def test_a_made_working_directory_is_roots(plan: Plan) -> None:
    settings = {"cwd": "/made", "user": user(uid=1000)}
    assert run(plan("stat -c %a:%u .; pwd", process=settings))[1] == "755:0\n/made\n"


def test_a_working_directory_that_is_a_file_is_named(plan: Plan) -> None:
    with start(plan("true", process={"cwd": "/etc/passwd/x"})) as process:
        assert process.message["error"] == "FailedPrecondition"
        assert "/etc/passwd/x" in process.message["text"]


# ---- privileges ----


def test_capabilities_of_root(plan: Plan) -> None:
    mask = capabilities.mask(DEFAULT_CAPABILITIES)
    _, output = run(plan("grep ^Cap /proc/self/status"))
    assert {line.split()[0]: int(line.split()[1], 16) for line in output.splitlines()} == {
        "CapInh:": 0,
        "CapPrm:": mask,
        "CapEff:": mask,
        "CapBnd:": mask,
        "CapAmb:": 0,
    }


def test_a_user_has_ambient_capabilities_only(plan: Plan) -> None:
    bind = capabilities.mask(["NET_BIND_SERVICE"])
    sets = capability_sets(capabilities.mask(DEFAULT_CAPABILITIES), bind, bind)
    made = plan(
        "grep ^Cap[EA] /proc/self/status", process={"user": user(uid=1), "capabilities": sets}
    )
    assert run(made)[1] == f"CapEff:\t{bind:016x}\nCapAmb:\t{bind:016x}\n"
    made["process"]["capabilities"] = capability_sets(capabilities.mask(DEFAULT_CAPABILITIES))
    assert run(made)[1] == f"CapEff:\t{0:016x}\nCapAmb:\t{0:016x}\n"


def test_a_capability_that_nobody_here_has_is_a_warning(plan: Plan) -> None:
    held = capabilities.names(
        int(Path("/proc/self/status").read_text().split("CapPrm:")[1].split()[0], 16)
    )
    with start(
        plan("true", process={"capabilities": capability_sets(capabilities.known())})
    ) as process:
        missing = set(capabilities.names(capabilities.known())) - set(held)
        expected = {f"capability {name}: not available" for name in missing}
        assert set(process.ready["warnings"]) == expected


@pytest.mark.parametrize("value", [False, True])
def test_no_new_privs(plan: Plan, value: bool) -> None:
    made = plan(status_field("NoNewPrivs"), process={"no_new_privs": value})
    assert run(made)[1] == f"NoNewPrivs:\t{value:d}\n"


def test_limits(plan: Plan) -> None:
    limits = [
        {"resource": "NOFILE", "soft": 100, "hard": 200},
        {"resource": "CORE", "soft": 0, "hard": 0},
    ]
    _, output = run(plan("ulimit -n; ulimit -Hn; ulimit -c", process={"rlimits": limits}))
    assert output.split() == ["100", "200", "0"]


def test_a_limit_that_may_not_be_raised_stays_and_is_a_warning(plan: Plan) -> None:
    """Without SYS_RESOURCE; with it, the limit is simply raised."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limits = [{"resource": "NOFILE", "soft": 1024, "hard": hard + 1}]
    with start(plan("ulimit -n; ulimit -Hn", process={"rlimits": limits})) as process:
        refusal = f"limit NOFILE: not raised above {hard}, the agent's own; a higher one takes CAP_SYS_RESOURCE"
        warned = process.ready["warnings"] == [refusal]
        process.go()
        assert process.output().split() == ["1024", str(hard if warned else hard + 1)]


def test_an_unknown_limit_is_named(plan: Plan) -> None:
    limits = [{"resource": "NOSUCH", "soft": 1, "hard": 1}]
    with start(plan("true", process={"rlimits": limits})) as process:
        assert process.message["error"] == "InvalidArgument"
        assert "NOSUCH" in process.message["text"]


def test_oom_score_adj(plan: Plan) -> None:
    assert run(plan("cat /proc/self/oom_score_adj", process={"oom_score_adj": 500}))[1] == "500\n"


def test_a_lower_oom_score_is_set_or_a_warning(plan: Plan) -> None:
    with start(plan("cat /proc/self/oom_score_adj", process={"oom_score_adj": -500})) as process:
        refused = process.ready["warnings"] == ["oom_score_adj -500: not permitted"]
        process.go()
        own = Path("/proc/self/oom_score_adj").read_text().strip()
        assert process.output().strip() == (own if refused else "-500")


@pytest.mark.parametrize(
    ("field", "kind"), [("apparmor", "AppArmor profile"), ("selinux", "SELinux label")]
)
def test_a_label_that_cannot_be_had_is_named(plan: Plan, field: str, kind: str) -> None:
    """Where AppArmor is on, a profile of that name is not loaded; where it is off, there are none."""
    is_on = Path("/sys/module/apparmor/parameters/enabled").exists() and field == "apparmor"
    with start(plan("true", process={field: "no-such-label"})) as process:
        assert process.message["error"] == ("FailedPrecondition" if is_on else "Unsupported")
        assert f'{kind} "no-such-label"' in process.message["text"]


def test_the_waiting_process_cannot_be_looked_into(plan: Plan) -> None:
    with start(plan("true", process={"user": user(uid=1000)})) as process:
        assert process.ready
        assert os.stat(f"/proc/{process.pid}/fd").st_uid == 0


# ---- terminals ----


def test_a_terminal(plan: Plan) -> None:
    with start(plan("tty; ls -l /dev/console; echo typed $(cat)", tty=True)) as process:
        assert process.ready
        assert process.master != -1
        process.go()
        os.write(process.master, b"words\n\x04")
        output = process.output()
        assert process.wait() == 0
    assert "/dev/pts/0\r\n" in output
    assert "136,   0" in output
    assert "typed words" in output


def test_a_terminal_belongs_to_its_user_and_controls(plan: Plan) -> None:
    made = plan(
        "stat -c %u $(tty); echo > /dev/tty && echo ok", tty=True, process={"user": user(uid=1000)}
    )
    with start(made) as process:
        process.go()
        assert process.output().split() == ["1000", "ok"]
