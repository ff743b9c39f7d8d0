"""Execs, attachments and logs of running containers, and the killing of whole cgroups."""

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import pytest

from nodeagent.cgroups.group import Cgroup
from nodeagent.cgroups.manager import Cgroups
from nodeagent.errors import FailedPrecondition, NotFound, StartError
from nodeagent.requests import Resources
from nodeagent.sandbox.agent.client import AttachIO, CgroupFds, ExecExit, ExecIO
from nodeagent.sandbox.supervisor.pump import ATTACH_BUFFER_BYTES
from tests.kernel.sandbox.supervised import (
    NO_CGROUP,
    Node,
    Pod,
    cgroup_fds,
    children,
    eventually,
    exists,
    private_kib,
    running_node,
)

ECHO = "while read line; do echo got $line; done; echo end; sleep 1000"


@pytest.fixture
async def node(tmp_path: Path, layer: Path) -> AsyncIterator[Node]:
    async with running_node(tmp_path, layer) as node:
        yield node


@pytest.fixture
async def pod(node: Node) -> Pod:
    return await node.pod()


@pytest.fixture
def group() -> Iterator[Cgroup]:
    cgroups = Cgroups.open(driver="cgroupfs", default_parent=f"/na-test-{os.getpid()}-streams")
    group = cgroups.create(
        cgroups.container_path("", "container"), Resources(memory_limit_bytes=32 << 20)
    )
    yield group
    group.kill()
    group.remove()


@pytest.fixture
def fds(group: Cgroup) -> Iterator[CgroupFds]:
    with cgroup_fds(group) as fds:
        yield fds


# ---- execs ----


async def test_an_exec_runs_in_the_container(pod: Pod) -> None:
    await pod.run("echo $$ > /tmp/pid; sleep 1000")
    assert await pod.output_of("cat /tmp/pid; echo $GREETING") == "1\nhello\n"
    assert await (await pod.exec("exit 7")).wait() == ExecExit(code=7, timed_out=False)
    assert await (await pod.exec("kill -9 $$")).wait() == ExecExit(code=137, timed_out=False)
    assert children(pod.supervisor.pid) == [(await pod.supervisor.state())[0].pid]


async def test_execs_leave_nothing_in_memory(pod: Pod, fds: CgroupFds) -> None:
    """Probes run them for weeks."""
    await pod.run("sleep 1000", cgroup=fds)

    async def execute(times: int) -> int:
        for _ in range(times):
            await (await pod.exec(["true"], cgroup=fds, timeout_ms=60_000)).wait()
        return private_kib(pod.supervisor.pid)

    before = await execute(100)
    assert await execute(200) - before <= 12


async def test_an_exec_is_in_the_namespaces_of_the_container(node: Node) -> None:
    pod = await node.pod(hostname="web-0")
    pid = await pod.run("sleep 1000")
    kinds = ("cgroup", "ipc", "mnt", "net", "pid", "uts")
    listed = await pod.output_of(" ; ".join(f"readlink /proc/self/ns/{kind}" for kind in kinds))
    assert listed.split() == [os.readlink(f"/proc/{pid}/ns/{kind}") for kind in kinds]
    assert os.readlink(f"/proc/{pod.supervisor.pid}/ns/pid_for_children") == os.readlink(
        "/proc/self/ns/pid"
    )


async def test_stdin_reaches_an_exec(pod: Pod) -> None:
    await pod.run("sleep 1000")
    (read_in, write_in), (read_out, write_out) = os.pipe(), os.pipe()
    handle = await pod.exec("cat", streams=ExecIO(stdin=read_in, stdout=write_out))
    os.close(read_in)
    os.close(write_out)
    os.write(write_in, b"there and back")
    os.close(write_in)
    assert (await handle.wait()).code == 0
    assert os.read(read_out, 100) == b"there and back"
    assert os.read(read_out, 100) == b""
    os.close(read_out)


async def test_an_exec_has_a_terminal_of_the_asked_size(pod: Pod) -> None:
    await pod.run("sleep 1000")
    command = "stty size; read x; stty size; read x; exit 4"
    (read_in, write_in), (read_out, write_out) = os.pipe(), os.pipe()
    os.set_blocking(read_out, False)
    streams = ExecIO(stdin=read_in, stdout=write_out)
    handle = await pod.exec(command, tty=True, size=(100, 30), streams=streams)
    os.close(read_in)
    os.close(write_out)
    assert await read_until(read_out, b"30 100\r\n")
    await handle.resize(120, 40)
    os.write(write_in, b"\n")
    assert await read_until(read_out, b"40 120\r\n")
    os.write(write_in, b"\n")
    assert (await handle.wait()).code == 4
    os.close(write_in)
    os.set_blocking(read_out, True)
    while os.read(read_out, 100):
        pass
    os.close(read_out)


async def test_a_terminal_that_its_client_has_left_is_hung_up(pod: Pod) -> None:
    await pod.run("sleep 1000")
    (read_in, write_in), (read_out, write_out) = os.pipe(), os.pipe()
    command = "trap 'exit 6' HUP; echo begun; while :; do sleep 0.05; done"
    streams = ExecIO(stdin=read_in, stdout=write_out)
    handle = await pod.exec(command, tty=True, streams=streams)
    os.close(read_in)
    os.close(write_out)
    assert await read_until(read_out, b"begun\r\n")
    os.close(read_out)
    assert (await handle.wait()).code == 6
    with pytest.raises(BrokenPipeError):
        os.write(write_in, b"x")
    os.close(write_in)


async def test_a_command_whose_client_has_left_reads_the_end_of_its_input(pod: Pod) -> None:
    await pod.run("sleep 1000")
    (read_in, write_in), (read_out, write_out) = os.pipe(), os.pipe()
    streams = ExecIO(stdin=read_in, stdout=write_out)
    handle = await pod.exec("cat; exit 5", streams=streams)
    for descriptor in (read_in, write_out, read_out, write_in):
        os.close(descriptor)
    assert (await handle.wait()).code == 5


@pytest.mark.parametrize("argv", [["/absent"], ["/etc/passwd"]])
async def test_a_command_that_cannot_be_executed(pod: Pod, argv: list[str]) -> None:
    await pod.run("sleep 1000")
    with pytest.raises(StartError, match=argv[0]):
        await pod.exec(argv)
    assert (await pod.supervisor.state())[0].exit is None


async def test_there_is_no_exec_without_a_running_container(pod: Pod) -> None:
    with pytest.raises(NotFound):
        await pod.exec("true")
    await pod.supervisor.create(pod.plan("sleep 1000"), NO_CGROUP)
    with pytest.raises(FailedPrecondition, match="is created, not running"):
        await pod.exec("true")
    await pod.supervisor.start("main")
    await pod.supervisor.stop("main", signal.SIGKILL, 0)
    await pod.wait("main")
    with pytest.raises(FailedPrecondition, match="is exited, not running"):
        await pod.exec("true")


async def test_the_whole_tree_of_an_exec_ends_at_its_timeout(
    pod: Pod, group: Cgroup, fds: CgroupFds
) -> None:
    await pod.run("sleep 1000", cgroup=fds)
    child = group.child("exec")
    with cgroup_fds(child) as own:
        handle = await pod.exec(
            "sleep 1001 & (sleep 1002 &) ; sleep 1003", timeout_ms=200, cgroup=own
        )
        assert await handle.wait() == ExecExit(code=137, timed_out=True)
    await eventually(lambda: not child.populated())
    child.remove()
    assert len(group.processes()) == 1
    assert "1001" not in await pod.output_of("ps")


async def test_an_exec_whose_caller_is_cancelled_is_killed(pod: Pod) -> None:
    pid = await pod.run("sleep 1000")
    starting = asyncio.create_task(pod.exec("sleep 1001"))
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await eventually(lambda: children(pod.supervisor.pid) == [pid])


async def test_what_an_exec_leaves_behind_holds_nobody_up(pod: Pod) -> None:
    await pod.run("sleep 1000")
    handle = await pod.exec("sleep 1001 & exit 5")
    assert (await handle.wait()).code == 5


# ---- cgroups ----


async def test_a_container_is_in_its_cgroup(pod: Pod, group: Cgroup, fds: CgroupFds) -> None:
    pid = await pod.run("sleep 1000 & sleep 1001", cgroup=fds)
    await eventually(lambda: len(group.processes()) == 2)
    assert pid in group.processes()


async def test_an_oom_kill_is_told_from_a_kill(pod: Pod, fds: CgroupFds) -> None:
    await pod.run("exec dd if=/dev/zero of=/dev/null bs=200M", cgroup=fds)
    end = await pod.wait("main")
    assert (end["code"], end["oom"]) == (137, True)
    await pod.run("exec sleep 1000", "second", cgroup=fds)
    await pod.supervisor.stop("second", signal.SIGKILL, 0)
    assert (await pod.wait("second"))["oom"] is False


async def test_an_oom_kill_of_a_child_is_not_the_containers(pod: Pod, fds: CgroupFds) -> None:
    await pod.run("dd if=/dev/zero of=/dev/null bs=200M; echo $?; exit 0", cgroup=fds)
    end = await pod.wait("main")
    assert (end["code"], end["oom"]) == (0, False)
    assert pod.log()[-1] == "137"


async def test_an_oom_kill_without_a_supervisor_is_noticed(pod: Pod, fds: CgroupFds) -> None:
    await pod.run("sleep 0.3; exec dd if=/dev/zero of=/dev/null bs=200M", cgroup=fds)
    await pod.kill_supervisor()
    await asyncio.sleep(1)
    await pod.succeed()
    end = await pod.wait("main")
    assert (end["code"], end["oom"]) == (137, True)


@pytest.mark.parametrize("how", ["stop", "exit", "remove"])
async def test_all_of_a_container_without_a_pid_namespace_ends_with_it(
    pod: Pod, group: Cgroup, fds: CgroupFds, how: str
) -> None:
    last = "sleep 2" if how == "exit" else "sleep 1003"
    await pod.run(f"sleep 1001 & (sleep 1002 &); {last}", pid="node", cgroup=fds)
    await eventually(lambda: len(group.processes()) >= 3)
    processes = group.processes()
    if how == "stop":
        await pod.supervisor.stop("main", signal.SIGTERM, 0)
    elif how == "remove":
        await pod.supervisor.remove("main")
    if how != "remove":
        await pod.wait("main")
    await eventually(lambda: not any(exists(pid) for pid in processes))


# ---- logs ----


async def test_rotation_loses_nothing(pod: Pod) -> None:
    await pod.run("i=0; while :; do i=$((i+1)); echo $i; done")
    path = pod.log_path()
    rotated = [path.with_suffix(f".{number}") for number in range(10)]
    for old in rotated:
        await asyncio.sleep(0.02)
        path.rename(old)
        await pod.supervisor.reopen_log("main")
        size = old.stat().st_size
        assert path.exists()
        await asyncio.sleep(0.01)
        assert old.stat().st_size == size
    await pod.supervisor.stop("main", signal.SIGKILL, 0)
    await pod.wait("main")
    text = b"".join(file.read_bytes() for file in (*rotated, path)).decode()
    numbers = [int(line.rsplit(" ", 1)[1]) for line in text.splitlines()]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) > 1000


async def test_a_terminal_logs_as_stdout(pod: Pod) -> None:
    await pod.run("echo out; echo err >&2; printf rest", tty=True)
    await pod.wait("main")
    assert pod.records() == [
        ("stdout", "F", "out\r"),
        ("stdout", "F", "err\r"),
        ("stdout", "P", "rest"),
    ]


async def test_without_a_log_path_output_goes_nowhere(pod: Pod) -> None:
    await pod.run("dd if=/dev/zero bs=1M count=2; exit 3", log_path="")
    assert (await pod.wait("main"))["code"] == 3


async def test_a_full_disk_does_not_stop_the_container(pod: Pod, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    os.system(f"mount -t tmpfs -o size=64k none {full}")  # noqa: ASYNC221
    try:
        await pod.run("yes | head -100000; exit 3", log_path=str(full / "log"))
        assert (await pod.wait("main"))["code"] == 3
        [state] = await pod.supervisor.state()
        lines = (full / "log").read_bytes().split(b"\n")
        assert lines.pop() == b""
        assert len(lines) + state.dropped_log_lines == 100_000
        assert all(re.fullmatch(rb"\S+ stdout F y", line) for line in lines)
    finally:
        os.system(f"umount {full}")  # noqa: ASYNC221


async def test_the_log_ends_though_others_hold_the_pipe(pod: Pod) -> None:
    await pod.run("(sleep 0.5; echo late) & printf rest; exit 0", pid="node")
    await pod.wait("main")
    assert pod.records() == [("stdout", "P", "rest")]


async def test_a_container_that_reads_its_own_pipe_harms_nobody(pod: Pod) -> None:
    await pod.run("cat /proc/self/fd/1 > /dev/null & i=0; while :; do i=$((i+1)); echo $i; done")
    await pod.run("echo fine", "other")
    await pod.wait("other")
    await asyncio.sleep(0.2)
    assert pod.log("other") == ["fine"]
    await pod.supervisor.stop("main", signal.SIGKILL, 0)
    await pod.wait("main")
    assert all(tag == "F" for _, tag, _ in pod.records())


# ---- attachments ----


async def test_those_who_are_attached_see_what_comes(pod: Pod) -> None:
    await pod.run("echo before; read go; echo out; echo err >&2; sleep 1000", stdin=True)
    await eventually(lambda: pod.log() == ["before"])
    with await pod.supervisor.attach("main") as one, await pod.supervisor.attach("main") as two:
        write(one, b"go\n")
        for attached in (one, two):
            assert await read_until(attached.stdout, b"out\n") == b"out\n"
            assert await read_until(attached.stderr, b"err\n") == b"err\n"
    assert sorted(pod.log()) == ["before", "err", "out"]


async def test_output_ends_with_the_container(pod: Pod) -> None:
    await pod.run("read go; echo last", stdin=True)
    with await pod.supervisor.attach("main") as attached:
        write(attached, b"\n")
        await pod.wait("main")
        assert await read_all(attached.stdout) == b"last\n"
        assert await read_all(attached.stderr) == b""
        assert not attached.cut_off.is_set()


async def test_input_that_is_for_one_ends_with_them(pod: Pod) -> None:
    await pod.run(ECHO, stdin=True, stdin_once=True)
    with await pod.supervisor.attach("main") as attached:
        write(attached, b"this\n")
        await eventually(lambda: pod.log() == ["got this"])
    await eventually(lambda: pod.log() == ["got this", "end"])


async def test_input_that_is_for_all_goes_on(pod: Pod) -> None:
    await pod.run(ECHO, stdin=True)
    for word in ("one", "two"):
        with await pod.supervisor.attach("main") as attached:
            write(attached, word.encode() + b"\n")
            await eventually(partial(logs, pod, f"got {word}"))
    assert pod.log() == ["got one", "got two"]


async def test_without_an_agent_nobody_is_attached(pod: Pod) -> None:
    await pod.run(ECHO, stdin=True, stdin_once=True)
    attached = await pod.supervisor.attach("main")
    await pod.reconnect()
    attached.__exit__()
    await eventually(lambda: pod.log() == ["end"])


async def test_a_terminal_is_attached_to_as_it_is(pod: Pod) -> None:
    await pod.run("read x; echo got $x; sleep 1000", tty=True, stdin=True)
    with await pod.supervisor.attach("main") as attached:
        assert attached.stderr is None
        write(attached, b"this\n")
        assert await read_until(attached.stdout, b"got this\r\n") == b"this\r\ngot this\r\n"
    await pod.supervisor.resize("main", 100, 30)
    assert await pod.output_of("stty size < /dev/console") == "30 100\n"


async def test_who_reads_too_slowly_is_cut_off_and_holds_nobody_up(pod: Pod) -> None:
    await pod.run("read go; yes | head -700000; echo end", stdin=True)
    with await pod.supervisor.attach("main") as slow:
        write(slow, b"\n")
        await pod.wait("main")
        await asyncio.wait_for(slow.cut_off.wait(), 60)
        seen = await read_all(slow.stdout)
    assert ATTACH_BUFFER_BYTES // 2 <= len(seen) <= ATTACH_BUFFER_BYTES
    assert pod.log()[-1] == "end"
    assert len(pod.log()) == 700_001


async def test_a_container_that_reads_nothing_has_no_input(pod: Pod) -> None:
    await pod.run("cat; echo end; sleep 1000")
    await eventually(lambda: pod.log() == ["end"])
    with await pod.supervisor.attach("main") as attached:
        assert attached.stdin is None


def logs(pod: Pod, line: str) -> bool:
    return line in pod.log()


def write(attached: AttachIO, data: bytes) -> None:
    assert attached.stdin is not None
    assert os.write(attached.stdin, data) == len(data)


async def read_until(descriptor: int | None, end: bytes) -> bytes:
    """What comes, up to and with `end`."""
    assert descriptor is not None
    data = b""
    async with asyncio.timeout(60):
        while not data.endswith(end):
            data += await _read(descriptor)
    return data


async def read_all(descriptor: int | None) -> bytes:
    assert descriptor is not None
    chunks = []
    async with asyncio.timeout(60):
        while chunk := await _read(descriptor):
            chunks.append(chunk)
    return b"".join(chunks)


async def _read(descriptor: int) -> bytes:
    while True:
        try:
            return os.read(descriptor, 65536)
        except BlockingIOError:
            await asyncio.sleep(0.002)
