"""Logs as the kubelet reads them, and commands in running containers."""

import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import grpc
import pytest

from nodeagent.api import runtime_pb2 as pb
from nodeagent.linux import syscalls
from tests.support.cri import Container, Cri, refused
from tests.support.node import wait_for

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}(Z|[+-]\d\d:\d\d) (stdout|stderr) [PF] .*")


def test_log_lines(cri: Cri) -> None:
    container = cri.run("sh", "-c", "echo out; echo err >&2; printf unterminated")
    container.ended()
    lines = container.log.read_text().splitlines()
    assert all(LINE.fullmatch(line) for line in lines)
    assert sorted(line.split(" ", 1)[1] for line in lines) == [
        "stderr F err",
        "stdout F out",
        "stdout P unterminated",
    ]
    assert container.status.log_path == str(container.log)
    assert container.log.stat().st_mode & 0o777 == 0o640
    container.pod.remove()


@pytest.mark.parametrize("place", ["link", "/proc/none", "/sys/none"])
def test_a_log_that_cannot_be_made_is_named(cri: Cri, tmp_path: Path, place: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "none")
    pod = cri.pod(log_directory=str(tmp_path / place))
    start = pod.container().start
    refused(grpc.StatusCode.FAILED_PRECONDITION, f"log {tmp_path / place}/main.log: ", start)
    pod.remove()


def test_long_lines_are_split(cri: Cri) -> None:
    container = cri.run("sh", "-c", "head -c 40000 /dev/zero | tr '\\0' x; echo")
    container.ended()
    tags = [line.split(" ", 3)[2] for line in container.log.read_text().splitlines()]
    assert tags[-1] == "F"
    assert set(tags[:-1]) == {"P"}
    assert container.output.replace("\n", "") == "x" * 40000
    container.pod.remove()


def test_rotation_loses_nothing(cri: Cri) -> None:
    container = cri.run(
        "sh", "-c", "i=0; while [ $i -lt 2000 ]; do echo $i; i=$((i+1)); done; sleep 1"
    )
    rotated = container.log.with_suffix(".old")
    wait_for("output", lambda: container.log.stat().st_size > 0)
    container.log.rename(rotated)
    request = pb.ReopenContainerLogRequest(container_id=container.id)
    cri.agent.runtime.ReopenContainerLog(request)
    size = rotated.stat().st_size
    assert container.log.exists()
    container.ended()
    assert rotated.stat().st_size == size
    texts = [path.read_text().splitlines() for path in (rotated, container.log)]
    numbers = [int(line.split(" ", 3)[3]) for text in texts for line in text]
    assert numbers == list(range(2000))
    container.pod.remove()


def test_exec_sync(cri: Cri) -> None:
    container = cri.run()
    answer = container.exec("sh", "-c", "echo out; echo err >&2; exit 5")
    assert (answer.stdout, answer.stderr, answer.exit_code) == (b"out\n", b"err\n", 5)
    container.pod.remove()


def test_exec_timeout_kills_the_tree(cri: Cri) -> None:
    container = cri.run()
    begin = time.monotonic()
    script = "sleep 777 & sleep 777"
    call = partial(container.exec, "sh", "-c", script, timeout=1)
    refused(grpc.StatusCode.DEADLINE_EXCEEDED, container.id, call)
    assert time.monotonic() - begin < 30
    assert "777" not in container.shell("ps")
    container.pod.remove()


def test_exec_timeout_holds_where_nothing_can_be_killed(cri: Cri) -> None:
    container = cri.run()
    freeze(container)
    call = partial(container.exec, "sleep", "100", timeout=1)
    refused(grpc.StatusCode.DEADLINE_EXCEEDED, "'sleep' ran longer than 1 s", call)
    container.pod.remove()


def test_groups_of_probes_do_not_pile_up(cri: Cri) -> None:
    """A probe that times out each time, or leaves something for a while, must not fill the node with groups."""
    container = cri.run()
    for _ in range(2):
        call = partial(container.exec, "sh", "-c", "sleep 777 & sleep 777", timeout=1)
        refused(grpc.StatusCode.DEADLINE_EXCEEDED, container.id, call)
    container.exec("sh", "-c", "sleep 0.1 &")

    def none_is_left() -> bool:
        container.exec("true")
        groups = [path for path, _, _ in os.walk("/sys/fs/cgroup") if container.id in path]
        return not any("/exec-" in path for path in groups)

    wait_for("no group of an exec", none_is_left)
    container.pod.remove()


def test_background_child_does_not_hold_the_exec(cri: Cri) -> None:
    container = cri.run()
    begin = time.monotonic()
    answer = container.exec("sh", "-c", "sleep 60 & echo done", timeout=50)
    assert answer.stdout == b"done\n"
    assert time.monotonic() - begin < 30
    container.pod.remove()


def test_exec_output_is_bounded(cri: Cri) -> None:
    container = cri.run()
    answer = container.exec("sh", "-c", "head -c 20000000 /dev/zero; exit 4", timeout=60)
    assert answer.exit_code == 4
    assert 0 < len(answer.stdout) <= 16 << 20
    container.pod.remove()


def test_exec_of_a_missing_program(cri: Cri) -> None:
    container = cri.run()
    refused(grpc.StatusCode.FAILED_PRECONDITION, "/nope", lambda: container.exec("/nope"))
    container.pod.remove()


def test_exec_in_an_ended_container(cri: Cri) -> None:
    container = cri.run("true")
    container.ended()
    refused(grpc.StatusCode.FAILED_PRECONDITION, container.id, lambda: container.exec("true"))
    container.pod.remove()


def test_exec_in_a_container_that_ends_before_the_program_runs(cri: Cri) -> None:
    """The freezer holds the new process between its birth and its program: the kubelet's probe that comes too late."""
    container = cri.run()
    freeze(container)
    with ThreadPoolExecutor(max_workers=1) as pool:
        command = pool.submit(container.exec, "true", timeout=0)
        wait_for("a frozen process", lambda: any(processes_of_execs(container)))
        container.stop()
        refused(grpc.StatusCode.FAILED_PRECONDITION, "before it executed", command.result)
    container.pod.remove()


def freeze(container: Container) -> None:
    groups = [Path(path) for path, _, _ in os.walk("/sys/fs/cgroup") if path.endswith(container.id)]
    for state, text in (("freezer.state", "FROZEN"), ("cgroup.freeze", "1")):
        for group in groups:
            if (group / state).exists():
                (group / state).write_text(text)


def processes_of_execs(container: Container) -> Iterator[str]:
    for path, _, _ in os.walk("/sys/fs/cgroup"):
        if container.id in path and "/exec-" in path:
            with suppress(FileNotFoundError):
                yield from (Path(path) / "cgroup.procs").read_text().split()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    syscalls.mount("tmpfs", str(tmp_path), "tmpfs", 0, "size=64k")
    yield tmp_path
    syscalls.umount2(str(tmp_path), 0)


def test_a_full_disk_does_not_stop_the_container(cri: Cri, small_disk: Path) -> None:
    pod = cri.pod(log_directory=str(small_disk))
    container = pod.run("sh", "-c", "seq 100000; exit 9")
    assert container.ended().exit_code == 9
    assert 0 < container.log.stat().st_size <= 64 << 10
    pod.remove()
