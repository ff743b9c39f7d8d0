"""Known escapes, tried on the processes that build and enter containers."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from nodeagent.linux import syscalls
from nodeagent.sandbox import rootfs_defaults
from nodeagent.sandbox.init import main as init
from nodeagent.sandbox.spec import Mount
from tests.kernel.sandbox.conftest import Plan
from tests.kernel.sandbox.containers import (
    exec_plan,
    process_plan,
    run,
    start,
    start_exec,
    v1_hierarchies,
)

DEFAULT = rootfs_defaults.default_mounts(False, v1_hierarchies())
ATTEMPTS = 60


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A directory of the node that no container may reach."""
    path = tmp_path / "outside"
    path.mkdir()
    (path / "precious").write_text("precious")
    return path


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    path = tmp_path / "volume"
    path.mkdir()
    return path


def upper_of(tmp_path: Path) -> Path:
    """The writable layer of the container that the test will start: what the image's author chose."""
    path = tmp_path / "container" / "upper"
    path.mkdir(parents=True)
    return path


def without(target: str) -> list[Mount]:
    return [mount for mount in DEFAULT if not mount["target"].startswith(target)]


@contextmanager
def repeating(attack: Callable[[], None]) -> Iterator[None]:
    """`attack` again and again, in another process, beside the body."""
    pid = os.fork()
    if pid == 0:
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        while True:
            with suppress(OSError):
                attack()
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# ---- mounts and made directories that links lead away ----


@pytest.mark.parametrize("climb", ["absolute", "relative"])
def test_cve_2021_30465_target_swapped_for_a_link(
    plan: Plan, volume: Path, outside: Path, climb: str
) -> None:
    """A shared volume whose directory becomes a link while a mount on it is made."""
    link = str(outside) if climb == "absolute" else f"../../../../../../../../{outside}"
    (volume / "target").mkdir()
    os.symlink(link, volume / "link")
    mounts = [
        *DEFAULT,
        rootfs_defaults.bind(str(volume), "/v"),
        rootfs_defaults.bind("/dev/shm", "/v/target/new"),
    ]
    made = plan(f"cat {outside}/precious /v/target/precious", mounts=mounts)

    def swap() -> None:
        os.rename(volume / "target", volume / "aside")
        os.rename(volume / "link", volume / "target")
        os.rename(volume / "target", volume / "link")
        os.rename(volume / "aside", volume / "target")

    with repeating(swap):
        for _ in range(ATTEMPTS):
            with start(made) as process:
                if "ready" in process.message:
                    process.go()
                    assert "precious\n" not in process.output()
            assert os.listdir(outside) == ["precious"]


@pytest.mark.parametrize("swapped", ["proc", "sys", "dev"])
def test_cve_2019_19921_proc_of_the_image_is_a_link(
    plan: Plan, tmp_path: Path, volume: Path, swapped: str
) -> None:
    """Masks would be laid elsewhere than what they shall hide."""
    (upper_of(tmp_path) / swapped).symlink_to("v")
    mounts = [rootfs_defaults.bind(str(volume), "/v"), *DEFAULT]
    with start(plan("true", mounts=mounts)) as process:
        assert process.message["error"] == "InvalidArgument"
        assert f"on /{swapped}: " in process.message["text"]
    assert os.listdir(volume) == []


@pytest.mark.parametrize("target", ["/link/made/deep", "/link", "/link/../link/made"])
def test_cve_2024_45310_nothing_is_made_outside(
    plan: Plan, tmp_path: Path, volume: Path, outside: Path, target: str
) -> None:
    upper = upper_of(tmp_path)
    (upper / "link").symlink_to(f"../../../../../../../../../..{outside}")
    mounts = [*DEFAULT, rootfs_defaults.bind(str(volume), target)]
    assert run(plan("true", mounts=mounts, process={"cwd": target}))[0] == 0
    assert os.listdir(outside) == ["precious"]


# ---- leaked descriptors and the working directory ----


@pytest.mark.parametrize("number", range(3, 24))
def test_cve_2024_21626_working_directory_in_proc_self_fd(plan: Plan, number: int) -> None:
    with start(plan("true", process={"cwd": f"/proc/self/fd/{number}"})) as process:
        assert "error" in process.message


@pytest.mark.parametrize("path", ["/proc/self/cwd", "/proc/self/root", "/proc/1/root/etc"])
def test_a_working_directory_behind_a_link_of_procfs(plan: Plan, path: str) -> None:
    with start(plan("true", process={"cwd": path})) as process:
        assert "error" in process.message


def test_cve_2024_21626_through_a_link_of_the_image(plan: Plan, tmp_path: Path) -> None:
    upper = upper_of(tmp_path)
    for number in range(3, 24):
        (upper / f"fd{number}").symlink_to(f"/proc/self/fd/{number}")
    for number in range(3, 24):
        with start(plan("true", process={"cwd": f"/fd{number}"})) as process:
            assert "error" in process.message


def test_cve_2024_21626_by_exec(plan: Plan) -> None:
    with start(plan("exec sleep 100")) as container:
        container.go()
        for number in range(3, 16):
            settings = process_plan(cwd=f"/proc/self/fd/{number}")
            with start_exec(container, exec_plan(["/bin/true"]), settings) as process:
                assert "error" in process.message


def test_programs_inherit_nothing(plan: Plan) -> None:
    with start(plan("ls /proc/self/fd; exec sleep 100")) as container:
        container.go()
        assert os.read(container.stdout, 100).split() == [b"0", b"1", b"2", b"3"]
        with start_exec(
            container, exec_plan(["/bin/ls", "/proc/self/fd"]), process_plan()
        ) as process:
            process.go()
            assert process.output().split() == ["0", "1", "2", "3"]


# ---- masks, consoles and procfs ----


def test_cve_2025_31133_null_of_the_container_is_a_link(
    plan: Plan, volume: Path, outside: Path
) -> None:
    """What masks a file is a null device of the runtime, whatever the container calls /dev/null."""
    (volume / "null").symlink_to(f"{outside}/precious")
    mounts = [*without("/dev"), rootfs_defaults.bind(str(volume), "/dev")]
    script = "stat -c %t:%T /proc/keys; cat /proc/keys; echo x > /proc/keys"
    made = plan(script, mounts=mounts, masked_paths=["/proc/keys"])
    reader = os.open("/dev/null", os.O_RDONLY)
    try:
        assert run(made, stdin=reader) == (0, "1:3\n")
    finally:
        os.close(reader)
    assert (outside / "precious").read_text() == "precious"


def test_cve_2025_31133_stdin_from_a_null_that_is_a_link(
    plan: Plan, volume: Path, outside: Path
) -> None:
    (volume / "null").symlink_to("/proc/sys/kernel/core_pattern")
    mounts = [*without("/dev"), rootfs_defaults.bind(str(volume), "/dev")]
    with start(plan("cat", mounts=mounts)) as process:
        assert process.message["error"] == "FailedPrecondition"
        assert "/dev/null" in process.message["text"]


@pytest.mark.parametrize("target", ["/proc/sysrq-trigger", "../proc/sys/kernel/core_pattern"])
def test_cve_2025_52565_console_of_the_image_is_a_link(
    plan: Plan, tmp_path: Path, target: str
) -> None:
    dev = upper_of(tmp_path) / "dev"
    dev.mkdir()
    (dev / "console").symlink_to(target)
    (dev / "pts").symlink_to("/proc")
    with start(plan("stat -c %t /dev/console; ls -d /dev/pts/0", tty=True)) as process:
        process.go()
        assert process.output().split() == ["88", "/dev/pts/0"]


def test_cve_2025_52565_console_on_a_dev_of_the_request(plan: Plan, volume: Path) -> None:
    """A terminal is never taken from, nor bound to, what a volume has at these places."""
    (volume / "pts").mkdir()
    (volume / "console").symlink_to("/proc/sysrq-trigger")
    os.mkfifo(volume / "pts" / "ptmx")
    mounts = [*without("/dev"), rootfs_defaults.bind(str(volume), "/dev")]
    with start(plan("true", mounts=mounts, tty=True)) as process:
        assert "/dev/pts/ptmx" in process.message["text"]


def test_cve_2025_52881_writes_to_procfs_are_not_redirected(plan: Plan, volume: Path) -> None:
    """The runtime writes through the node's own procfs, before anything of the container is looked at."""
    fake = volume
    (fake / "attr" / "apparmor").mkdir(parents=True)
    for name in ("oom_score_adj", "attr/exec", "attr/apparmor/exec"):
        (fake / name).touch()
    mounts = [
        *without("/proc"),
        rootfs_defaults.filesystem("/proc", "tmpfs", ""),
        rootfs_defaults.bind(str(volume), "/proc/self"),
        rootfs_defaults.bind(str(volume), "/proc/1"),
    ]
    made = plan("exec sleep 100", mounts=mounts, masked_paths=[], process={"oom_score_adj": 777})
    with start(made) as container:
        container.go()
        assert Path(f"/proc/{container.pid}/oom_score_adj").read_text() == "777\n"
    assert not any((fake / name).read_bytes() for name in ("oom_score_adj", "attr/exec"))


# ---- the node's interpreter inside the container ----


def in_child(function: Callable[[], int]) -> int:
    """The exit code of a child that does what `init` does first, and then calls `function`."""
    pid, pidfd = syscalls.clone3()
    if pid == 0:
        code = 99
        try:
            init._leave_supervisor()
            code = function()
        finally:
            os._exit(code)
    os.close(pidfd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_nothing_can_be_imported_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "planted.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)

    def attempt() -> int:
        try:
            __import__("planted")
        except (ImportError, ImportWarning):
            return 0
        return 1

    assert in_child(attempt) == 0
    assert attempt() == 1


def test_modules_of_the_image_are_not_looked_at(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every place of sys.path exists in the image, and has traps for whatever might be imported."""
    upper = upper_of(tmp_path)
    trap = "open('/trapped', 'w').close()"
    for place in [*sys.path, "/"]:
        directory = upper / place.lstrip("/")
        with suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            for name in (
                "traceback",
                "linecache",
                "tokenize",
                "idna",
                "stringprep",
                "pwd",
                "locale",
            ):
                (directory / f"{name}.py").write_text(trap)
    monkeypatch.chdir("/")
    for argv in (["/bin/true"], ["/bin/nope"]):
        with start(plan(argv)) as process:
            process.go()
    assert not (upper / "trapped").exists()


def test_users_are_not_asked_of_the_nodes_services() -> None:
    """pwd and grp would load libraries that the image names in nsswitch.conf."""
    script = (
        "import sys, nodeagent.sandbox.init.main; sys.exit(bool({'pwd', 'grp'} & set(sys.modules)))"
    )
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", script], dict(os.environ))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("name", ["passwd", "group"])
@pytest.mark.parametrize("kind", ["fifo", "huge", "link"])
def test_user_files_that_would_hang_or_fill_memory(
    plan: Plan, tmp_path: Path, outside: Path, name: str, kind: str
) -> None:
    etc = upper_of(tmp_path) / "etc"
    etc.mkdir()
    if kind == "fifo":
        os.mkfifo(etc / name)
    elif kind == "huge":
        with (etc / name).open("wb") as file:
            file.truncate(1 << 30)
    else:
        (etc / name).symlink_to(f"../../../../../..{outside}/precious")
    with start(plan("true")) as process:
        if kind == "link":
            assert process.ready["identity"]["groups"] == [0]
        else:
            assert process.message["error"] == "InvalidArgument"
            assert f"/etc/{name} of the image" in process.message["text"]
