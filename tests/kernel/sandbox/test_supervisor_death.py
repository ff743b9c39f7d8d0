"""What survives whom: containers the agent, the supervisor and the launcher; what happened is known afterwards."""

import asyncio
import errno
import json
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, closing, suppress
from pathlib import Path

import pytest

from nodeagent.errors import AlreadyExists, IncompatibleVersion, Unavailable
from nodeagent.linux import processes, syscalls
from nodeagent.sandbox import exits, facts, paths, protocol
from nodeagent.sandbox.agent.client import (
    CgroupFds,
    ContainerState,
    ExecIO,
    Launcher,
    Supervisor,
)
from nodeagent.sandbox.paths import SUPERVISOR_SOCKET
from nodeagent.sandbox.spec import PodPlan
from tests.kernel.sandbox.supervised import (
    NO_CGROUP,
    Node,
    Pod,
    children,
    eventually,
    exists,
    mounts_below,
    running_node,
    waits_in_splice,
)

COUNT = "i=0; while :; do i=$((i+1)); echo $i; done"
TICK = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.01; done"


@pytest.fixture
async def node(tmp_path: Path, layer: Path) -> AsyncIterator[Node]:
    async with running_node(tmp_path, layer) as node:
        yield node


async def state(pod: Pod) -> ContainerState:
    [only] = await pod.supervisor.state()
    return only


def is_counted_without_a_gap(lines: list[str]) -> bool:
    return lines == [str(number) for number in range(1, len(lines) + 1)]


async def kill_launcher(node: Node) -> None:
    os.kill(node.launcher.pid, signal.SIGKILL)
    await node.launcher.lost.wait()
    node.launcher.close()


# ---- the supervisor ----


async def test_a_container_does_not_notice_the_death_of_its_supervisor(node: Node) -> None:
    pod = await node.pod()
    pid = await pod.run(f"trap 'exit 7' TERM; {TICK}")
    await eventually(lambda: len(pod.log()) > 5)
    before = await state(pod)
    await pod.kill_supervisor()
    written = len(pod.log())
    await asyncio.sleep(0.1)
    assert len(pod.log()) == written
    await pod.succeed()
    assert await state(pod) == before
    await eventually(lambda: len(pod.log()) > written + 5)
    await pod.supervisor.stop("main", signal.SIGTERM, 60_000)
    end = await pod.wait("main")
    assert end["code"] == 7
    assert is_counted_without_a_gap(pod.log())
    await eventually(lambda: not exists(pid))


@pytest.mark.parametrize("attempt", range(5))
async def test_no_line_is_lost_or_logged_twice(node: Node, attempt: int) -> None:
    pod = await node.pod()
    await pod.run(COUNT)
    for _ in range(3):
        await asyncio.sleep(0.03 + 0.01 * attempt)
        await pod.kill_supervisor()
        await pod.succeed()
    await pod.supervisor.stop("main", signal.SIGTERM, 0)
    await pod.wait("main")
    assert len(pod.log()) > 1000
    assert is_counted_without_a_gap(pod.log())


async def test_an_unfinished_line_goes_on(node: Node) -> None:
    pod = await node.pod()
    await pod.run("printf begin; sleep 0.3; echo ' end'; sleep 1000")
    await asyncio.sleep(0.1)
    await pod.kill_supervisor()
    await pod.succeed()
    await eventually(lambda: pod.log() == ["begin end"])


async def test_an_end_without_a_supervisor_is_recorded(node: Node) -> None:
    pod = await node.pod()
    command = "trap 'echo after; printf rest; exit 9' TERM; echo before"
    pid = await pod.run(f"{command}; while :; do sleep 0.02; done")
    await eventually(lambda: pod.log() == ["before"])
    await pod.kill_supervisor()
    os.kill(pid, signal.SIGTERM)
    await eventually(lambda: exits.read(str(pod.directory), "main"))
    await pod.succeed()
    end = (await state(pod)).exit
    assert end is not None
    assert (end["code"], end["oom"]) == (9, False)
    assert await pod.wait("main") == end
    assert pod.log() == ["before", "after", "rest"]


async def test_a_container_that_was_killed_with_its_supervisor(node: Node) -> None:
    pod = await node.pod()
    pid = await pod.run("sleep 1000")
    os.kill(pod.supervisor.pid, signal.SIGSTOP)
    os.kill(pid, signal.SIGKILL)
    await pod.kill_supervisor()
    await pod.succeed()
    assert (await pod.wait("main"))["code"] == 137


@pytest.mark.parametrize("killer", ["kernel", "supervisor"])
@pytest.mark.parametrize("judge", ["supervisor", "launcher"])
async def test_whoever_sees_the_end_says_whether_it_was_an_oom_kill(
    node: Node, killer: str, judge: str
) -> None:
    """The counter has grown in any case: the OOM killer may have ended a child of the container before."""
    pod = await node.pod()
    counter = node.directory / "memory.events"
    counter.write_text("oom 0\noom_kill 3\n")
    file = os.open(counter, os.O_RDONLY)
    pid = await pod.run("sleep 1000", cgroup=CgroupFds(oom=file))
    os.close(file)
    counter.write_text("oom 1\noom_kill 4\n")
    if killer == "supervisor" and judge == "supervisor":
        await pod.supervisor.stop("main", signal.SIGTERM, 0)
    elif killer == "supervisor":  # which dies once it has written down that it kills
        state_file = pod.directory / "containers" / "main" / "state.json"
        state_file.write_text(json.dumps(json.loads(state_file.read_text()) | {"killed": True}))
    if judge == "launcher":
        os.kill(pod.supervisor.pid, signal.SIGSTOP)
    if (killer, judge) != ("supervisor", "supervisor"):
        os.kill(pid, signal.SIGKILL)
    if judge == "launcher":
        await pod.kill_supervisor()
        await pod.succeed()
    end = await pod.wait("main")
    assert (end["code"], end["oom"]) == (137, killer == "kernel")


async def test_a_created_container_can_be_started_by_a_successor(node: Node) -> None:
    pod = await node.pod()
    await pod.supervisor.create(pod.plan("echo hello; exit 4"), NO_CGROUP)
    await pod.kill_supervisor()
    await pod.succeed()
    assert (await state(pod)).started_at == 0
    await pod.supervisor.start("main")
    assert (await pod.wait("main"))["code"] == 4
    assert pod.log() == ["hello"]


@pytest.mark.parametrize("succeeded", ["before it reads", "after it is executed"])
async def test_a_start_that_was_cut_off_is_finished(node: Node, succeeded: str) -> None:
    pod = await node.pod()
    script = "trap 'exit 4' TERM; echo hello; while :; do sleep 0.02; done"
    made = await pod.supervisor.create(pod.plan(script), NO_CGROUP)
    os.kill(made.pid, signal.SIGSTOP)
    starting = asyncio.create_task(pod.supervisor.start("main"))
    await eventually(pod.log_path().exists)
    await eventually(lambda: processes.stat_fields(pod.supervisor.pid)[0] == b"S")  # has said "go"
    await pod.kill_supervisor()
    if succeeded == "before it reads":
        await pod.succeed()
    os.kill(made.pid, signal.SIGCONT)
    if succeeded != "before it reads":
        await eventually(lambda: Path(f"/proc/{made.pid}/comm").read_text() == "sh\n")
        await pod.succeed()
    assert (await state(pod)).started_at > 0
    await eventually(lambda: pod.log() == ["hello"])
    await pod.supervisor.stop("main", signal.SIGTERM, 60_000)
    assert (await pod.wait("main"))["code"] == 4
    with pytest.raises(Unavailable):
        await starting


async def test_a_creation_that_was_cut_off_is_forgotten(node: Node) -> None:
    pod = await node.pod()
    creating = asyncio.create_task(pod.supervisor.create(pod.plan("true"), NO_CGROUP))
    await asyncio.sleep(0)
    while not (found := children(pod.supervisor.pid)):
        pass
    os.kill(found[0], signal.SIGSTOP)
    try:
        await pod.kill_supervisor()
        with pytest.raises(Unavailable):
            await creating
        await pod.succeed()
        assert facts.listed(str(pod.directory)) == []
    finally:
        os.kill(found[0], signal.SIGCONT)
    await eventually(lambda: not exists(found[0]))
    await pod.run("exit 0")


async def test_a_pod_that_no_successor_understands_goes_on_until_it_is_ended(node: Node) -> None:
    """What a later release has written is left alone; whoever ends the pod kills what runs in it."""
    pod = await node.pod()
    pid = await pod.run(TICK)
    file = pod.directory / "containers" / "main" / "state.json"
    newer = json.dumps({**json.loads(file.read_text()), "version": 99})
    file.write_text(newer)
    await pod.kill_supervisor()
    with pytest.raises(IncompatibleVersion, match=f"{file}: version 99 is newer than 1"):
        await pod.succeed()
    assert exists(pid)
    assert file.read_text() == newer
    await pod.supervisor.shutdown()
    assert await node.launcher.pods() == []
    assert mounts_below(pod.directory) == []
    assert exists(pid)
    os.kill(pid, signal.SIGKILL)


async def test_a_deadline_is_kept_by_the_successor(node: Node) -> None:
    pod = await node.pod()
    await pod.run("trap '' TERM; while :; do sleep 0.05; done")
    await pod.supervisor.stop("main", signal.SIGTERM, 500)
    await pod.kill_supervisor()
    await pod.succeed()
    async with asyncio.timeout(60):
        assert (await pod.wait("main"))["code"] == 137


async def test_execs_stdin_and_namespaces_go_on(node: Node) -> None:
    pod = await node.pod(pid="pod", hostname="web-0")
    await pod.run("sleep 1000", "first", pid="pod")
    await pod.run("read x; echo got $x; sleep 1000", "second", pid="pod", stdin=True)
    await pod.kill_supervisor()
    await pod.succeed()
    assert "sleep 1000" in await pod.output_of("cat /proc/sys/kernel/hostname; ps", "first")
    await pod.run("cat /proc/sys/kernel/hostname; ps", "third", pid="pod")
    await pod.wait("third")
    assert pod.log("third")[0] == "web-0"
    assert any("sleep 1000" in line for line in pod.log("third"))
    with await pod.supervisor.attach("second") as attached:
        assert attached.stdin is not None
        os.write(attached.stdin, b"this\n")
        await eventually(lambda: pod.log("second") == ["got this"])


async def test_a_terminal_goes_on(node: Node) -> None:
    pod = await node.pod()
    await pod.run("read x; echo got $x; sleep 1000", tty=True, stdin=True)
    await pod.kill_supervisor()
    await pod.succeed()
    with await pod.supervisor.attach("main") as attached:
        assert attached.stdin is not None
        os.write(attached.stdin, b"this\n")
        await eventually(lambda: pod.log() == ["this\r", "got this\r"])
    await pod.supervisor.resize("main", 100, 30)


async def test_successors_have_successors(node: Node) -> None:
    pod = await node.pod()
    await pod.run(TICK)
    for _ in range(3):
        await pod.kill_supervisor()
        await pod.succeed()
    await pod.run("exit 3", "second")
    assert (await pod.wait("second"))["code"] == 3
    await pod.supervisor.stop("main", signal.SIGKILL, 0)
    assert (await pod.wait("main"))["code"] == 137
    assert is_counted_without_a_gap(pod.log())


async def test_a_shutdown_of_a_dead_supervisors_pod(node: Node) -> None:
    pod = await node.pod(pid="pod")
    pid = await pod.run("trap '' TERM; sleep 1000", pid="pod")
    await pod.kill_supervisor()
    await pod.supervisor.shutdown()
    assert not exists(pid)
    assert await node.launcher.pods() == []
    assert mounts_below(pod.directory) == []


def test_a_pin_that_cannot_be_removed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The supervisor, which nobody replaces afterwards, tries again; what is no mount is fine."""
    assert paths.unpin(str(tmp_path))

    def umount2(path: str, _flags: int) -> None:
        raise OSError(errno.ENOMEM if path.endswith("ipc") else errno.EINVAL, "no", path)

    monkeypatch.setattr(syscalls, "umount2", umount2)
    assert not paths.unpin(str(tmp_path))


async def test_nothing_is_left_open(node: Node) -> None:
    pod = await node.pod()
    await pod.run("true", "warm")
    await pod.wait("warm")
    await pod.supervisor.remove("warm")
    await node.launcher.pods()  # which first hears what supervisors have let go
    processes = (node.launcher.pid, pod.supervisor.pid)
    before = [len(os.listdir(f"/proc/{pid}/fd")) for pid in processes]
    for number in range(3):
        await pod.run("exit 0", f"c{number}", stdin=True, tty=number == 1)
        await pod.wait(f"c{number}")
        await pod.supervisor.remove(f"c{number}")
    await eventually(lambda: [len(os.listdir(f"/proc/{pid}/fd")) for pid in processes] == before)


async def test_a_pod_whose_supervisor_cannot_serve_leaves_no_mount(node: Node) -> None:
    """It has made the namespaces, and pinned them, by then."""
    directory = node.state / "pods" / "f0"
    (directory / "supervisor.sock").mkdir(parents=True)
    plan = PodPlan(id="f0", directory=str(directory), namespaces=["net", "ipc", "uts"])
    with pytest.raises(OSError, match="directory"):
        await node.launcher._channel.request("fork", plan=plan)
    assert (directory / "ns" / "net").exists()
    assert mounts_below(directory) == []


async def test_a_pod_whose_supervisor_cannot_be_reached_is_undone(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent may have no descriptor left for the connection: nobody would know of that supervisor."""

    async def connect(*_: object) -> Supervisor:
        raise OSError(errno.EMFILE, "Too many open files")

    directory = node.state / "pods" / "f0"
    directory.mkdir()
    monkeypatch.setattr(Supervisor, "connect", connect)
    with pytest.raises(OSError, match="Too many"):
        await node.launcher.fork(PodPlan(id="f0", directory=str(directory), namespaces=["net"]))
    await eventually(lambda: not children(node.launcher.pid))
    assert mounts_below(directory) == []
    assert await node.launcher.pods() == []


# ---- the launcher ----


async def test_supervisors_outlive_the_launcher_and_go_to_the_next(node: Node) -> None:
    pod = await node.pod()
    await pod.run(f"trap 'exit 7' TERM; {TICK}")
    await kill_launcher(node)
    assert (await state(pod)).exit is None
    await pod.run("exit 3", "second")
    assert (await pod.wait("second"))["code"] == 3
    await node.connect()
    async with asyncio.timeout(60):
        while await node.launcher.pods() != [pod.id]:  # noqa: ASYNC110 another process does it
            await asyncio.sleep(0.05)
    await asyncio.sleep(0.1)
    await pod.kill_supervisor()
    await pod.succeed()
    await pod.supervisor.stop("main", signal.SIGTERM, 60_000)
    assert (await pod.wait("main"))["code"] == 7
    assert is_counted_without_a_gap(pod.log())


async def test_a_fork_that_the_launcher_does_not_live_to_answer_is_undone(node: Node) -> None:
    for number in range(50):
        directory = node.state / "pods" / f"f{number}"
        directory.mkdir()
        plan = PodPlan(id=directory.name, directory=str(directory), namespaces=["net"])
        forking = asyncio.create_task(node.launcher.fork(plan))
        while not (found := children(node.launcher.pid)):  # noqa: ASYNC110 another process does it
            await asyncio.sleep(0)
        os.kill(found[0], signal.SIGSTOP)
        await kill_launcher(node)
        os.kill(found[0], signal.SIGCONT)
        try:
            supervisor = await forking
        except Unavailable:
            break
        await supervisor.shutdown()  # it was stopped too late: it had answered
        await node.connect()
    else:
        pytest.fail("every supervisor was faster than the test")
    await eventually(lambda: not exists(found[0]))
    assert not mounts_below(directory)
    await node.connect()


async def test_a_fork_that_is_cancelled_stays_so_when_the_launcher_dies(node: Node) -> None:
    os.kill(node.launcher.pid, signal.SIGSTOP)
    directory = node.state / "pods" / "f0"
    directory.mkdir()
    forking = asyncio.create_task(
        node.launcher.fork(PodPlan(id="f0", directory=str(directory), namespaces=["net"]))
    )
    await asyncio.sleep(0.1)
    forking.cancel()
    await kill_launcher(node)
    with pytest.raises(asyncio.CancelledError):
        await forking
    await node.connect()


async def test_launcher_and_supervisor_die_together(node: Node) -> None:
    pod = await node.pod(hostname="web-0")
    await pod.run("trap 'exit 7' TERM; trap '' PIPE; while :; do sleep 0.02; done")
    await kill_launcher(node)
    await pod.kill_supervisor()
    await node.connect()
    await pod.succeed()
    assert (await state(pod)).exit is None
    assert await pod.output_of("cat /proc/sys/kernel/hostname") == "web-0\n"
    await pod.supervisor.stop("main", signal.SIGTERM, 60_000)
    assert (await pod.wait("main"))["code"] == 7


async def test_a_successor_has_the_next_launcher_keep_what_it_has_found(node: Node) -> None:
    """The last one kept nothing, and there is one launcher for all successors to come."""
    pod = await node.pod()
    pid = await pod.run("trap 'exit 7' TERM; while :; do sleep 0.02; done")
    pipe = os.readlink(f"/proc/{pid}/fd/1")
    await kill_launcher(node)
    await pod.kill_supervisor()
    await node.connect()
    await pod.succeed()
    assert await node.launcher.pods() == [pod.id]
    fds = f"/proc/{node.launcher.pid}/fd"
    assert pipe in {os.readlink(f"{fds}/{fd}") for fd in os.listdir(fds)}


async def test_what_nobody_saw_is_unknown(node: Node) -> None:
    pod = await node.pod()
    pid = await pod.run("sleep 1000")
    await kill_launcher(node)
    await pod.kill_supervisor()
    os.kill(pid, signal.SIGKILL)
    await eventually(lambda: not exists(pid))
    await node.connect()
    await pod.succeed()
    assert (await pod.wait("main"))["code"] == 255


# ---- the launcher is not the last to close a pipe, whose lock somebody may hold ----


class Output:
    """The pipe of a container's output, which somebody else has open as well."""

    def __init__(self, pid: int) -> None:
        path = f"/proc/{pid}/fd/1"
        self.reader, self.writer = os.open(path, os.O_RDONLY), os.open(path, os.O_WRONLY)

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Somebody is in the middle of splice(2), and waits for room in a socket."""
        full, other = socket.socketpair()
        full.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                full.send(bytes(4096))
        full.setblocking(True)
        os.write(self.writer, b"x")
        threads: list[int] = []
        holding = asyncio.create_task(asyncio.to_thread(self._splice, full.fileno(), threads))
        try:
            await eventually(lambda: threads and waits_in_splice(f"/proc/self/task/{threads[0]}"))
            yield
        finally:
            other.close()
            await holding
            full.close()

    def _splice(self, full: int, threads: list[int]) -> None:
        threads.append(threading.get_native_id())
        with suppress(ConnectionError):
            os.splice(self.reader, full, 1)


async def test_the_launcher_abandons_a_pod_whose_pipe_is_held(node: Node) -> None:
    pod = await node.pod()
    pid = await pod.run("exec sleep 1000")
    with closing(Output(pid)) as output:
        await pod.kill_supervisor()
        async with output.held(), asyncio.timeout(60):
            await node.launcher.abandon(pod.id)
            assert await node.launcher.pods() == []
    os.kill(pid, signal.SIGKILL)
    await eventually(lambda: len(children(node.launcher.pid)) == 0)


async def test_the_launcher_drops_a_held_pipe_of_a_supervisor_that_has_died(node: Node) -> None:
    pod = await node.pod()
    pid = await pod.run("exec sleep 1000")
    await pod.supervisor.state()
    await node.launcher.pods()  # which has heard all that the start had to say
    with closing(Output(pid)) as output:
        os.kill(node.launcher.pid, signal.SIGSTOP)
        try:
            os.kill(pid, signal.SIGKILL)
            await pod.wait("main")  # told after it was asked to drop the pipes
            await pod.kill_supervisor()
            async with output.held(), asyncio.timeout(60):
                os.kill(node.launcher.pid, signal.SIGCONT)
                assert await node.launcher.pods() == []
        finally:
            os.kill(node.launcher.pid, signal.SIGCONT)
    await eventually(lambda: len(children(node.launcher.pid)) == 0)


# ---- the agent ----


async def test_execs_outlive_the_agent_but_terminals_do_not(node: Node) -> None:
    pod = await node.pod()
    await pod.run("sleep 1000")
    await pod.exec("sleep 0.3; touch /done")
    command = "trap 'touch /hung-up; exit' HUP; touch /begun; while :; do sleep 0.05; done"
    await pod.exec(command, tty=True)
    root = Path(f"/proc/{(await state(pod)).pid}/root")
    await eventually((root / "begun").exists)
    await pod.reconnect()
    await eventually(lambda: (root / "done").exists() and (root / "hung-up").exists())


async def test_an_agent_that_comes_back_finds_everything(node: Node) -> None:
    pod = await node.pod()
    await pod.run("exit 3", "one")
    await pod.run("sleep 1000", "two")
    await pod.wait("one")
    before = await pod.supervisor.state()
    await pod.reconnect()
    launcher = await Launcher.connect(node.state)
    assert await launcher.pods() == [pod.id]
    launcher.close()
    assert await pod.supervisor.state() == before
    ends = []
    pod.supervisor.on_exit = lambda container, end: ends.append((container, end["code"]))
    await pod.supervisor.stop("two", signal.SIGTERM, 0)
    await pod.wait("two")
    await eventually(lambda: ends == [("two", 137)])


async def test_a_waiting_exec_is_told_of_the_supervisors_death(node: Node) -> None:
    pod = await node.pod()
    await pod.run("sleep 1000")
    handle = await pod.exec("sleep 1000", streams=ExecIO())
    waiting = asyncio.create_task(handle.wait())
    await asyncio.sleep(0)
    await pod.kill_supervisor()
    with pytest.raises(Unavailable):
        await waiting
    await pod.succeed()


async def test_the_launcher_does_not_wait_for_a_supervisor_that_accepts_nobody(node: Node) -> None:
    """One that is held up, and to which more agents have connected than its queue holds."""
    pod = await node.pod()
    os.kill(pod.supervisor.pid, signal.SIGSTOP)
    await kill_launcher(node)
    await node.connect()
    with ExitStack() as queue:
        queue.callback(os.kill, pod.supervisor.pid, signal.SIGCONT)
        fill(str(pod.directory / SUPERVISOR_SOCKET), queue)
        async with asyncio.timeout(60):
            with pytest.raises(AlreadyExists):
                await node.launcher.successor(pod.id, pod.directory)
            assert await node.launcher.pods() == []
    await eventually_reconnected(pod)


async def eventually_reconnected(pod: Pod) -> None:
    """Once there is room in its queue again."""
    while True:
        try:
            await pod.reconnect()
        except OSError:
            await asyncio.sleep(0.01)
        else:
            return


def fill(path: str, queue: ExitStack) -> None:
    """Connect until there is no room."""
    while True:
        connection = queue.enter_context(
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        )
        try:
            with protocol.address(path) as address:
                connection.connect(address)
        except BlockingIOError:
            return
