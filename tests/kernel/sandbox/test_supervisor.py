"""Pods and containers through a real launcher and its supervisors."""

import asyncio
import os
import signal
import socket
import stat
import struct
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest

from nodeagent.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    StartError,
    Unavailable,
    Unsupported,
)
from nodeagent.sandbox import protocol
from nodeagent.sandbox.agent import deadlines, starting
from nodeagent.sandbox.agent.client import Launcher, Supervisor
from nodeagent.sandbox.spec import PodPlan
from nodeagent.sandbox.supervisor import namespaces
from tests.kernel.sandbox.containers import user
from tests.kernel.sandbox.supervised import (
    NO_CGROUP,
    Node,
    children,
    eventually,
    exists,
    mounts_below,
    pod_settings,
    running_node,
)


@pytest.fixture
async def node(tmp_path: Path, layer: Path) -> AsyncIterator[Node]:
    async with running_node(tmp_path, layer) as node:
        yield node


# ---- the launcher ----


async def test_the_interpreter_is_a_sealed_copy(node: Node) -> None:
    executable = f"/proc/{node.launcher.pid}/exe"
    assert os.readlink(executable).startswith("/memfd:")
    with pytest.raises(OSError, match=r"not permitted|busy"):
        os.open(executable, os.O_WRONLY)


async def test_the_launcher_serves_root_alone(node: Node) -> None:
    mode = (node.state / "launcher.sock").stat().st_mode
    assert stat.S_IMODE(mode) == 0o600
    pod = await node.pod()
    assert stat.S_IMODE((pod.directory / "supervisor.sock").stat().st_mode) == 0o600


async def test_there_is_one_launcher(node: Node) -> None:
    others = await asyncio.gather(*(Launcher.connect_or_start(node.state) for _ in range(3)))
    assert {other.pid for other in others} == {node.launcher.pid}
    for other in others:
        other.close()


async def test_who_starts_one_at_the_same_moment_gets_the_same(tmp_path: Path) -> None:
    launchers = await asyncio.gather(*(Launcher.connect_or_start(tmp_path) for _ in range(3)))
    assert len({launcher.pid for launcher in launchers}) == 1
    for launcher in launchers[1:]:
        launcher.close()
    await launchers[0].stop()


async def test_a_launcher_that_does_not_answer_is_replaced(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No agent would start any more: what it asks first would wait for ever."""
    monkeypatch.setattr(deadlines, "QUICK_SECONDS", 0.2)
    stopped = await Launcher.connect(node.state)
    os.kill(stopped.pid, signal.SIGSTOP)
    replacing = await Launcher.connect_or_start(node.state)
    assert stopped.lost.is_set()
    assert replacing.pid != stopped.pid
    assert await replacing.pods() == []
    stopped.close()
    node.launcher.close()
    node.launcher = replacing


async def test_the_launcher_stays_while_there_are_pods(node: Node) -> None:
    pod = await node.pod()
    assert await node.launcher.pods() == [pod.id]
    with pytest.raises(FailedPrecondition, match="1 pods are left"):
        await node.launcher.stop()
    await pod.supervisor.shutdown()
    assert await node.launcher.pods() == []


async def test_an_interpreter_that_cannot_be_copied_is_used_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starting, "sealed_copy", lambda _path: os.memfd_create("not a program"))
    launcher = await Launcher.connect_or_start(tmp_path)
    assert "cannot be run from a sealed copy" in caplog.text
    assert os.readlink(f"/proc/{launcher.pid}/exe") == os.readlink("/proc/self/exe")
    await launcher.stop()


async def test_a_launcher_comes_up_though_nobody_waits_for_it(tmp_path: Path) -> None:
    starting_it = asyncio.create_task(Launcher.connect_or_start(tmp_path))
    while not (tmp_path / "launcher.log").exists():  # noqa: ASYNC110 another process does it
        await asyncio.sleep(0)
    starting_it.cancel()
    with suppress(asyncio.CancelledError):
        await starting_it
    launcher = await connected(tmp_path)
    assert await launcher.pods() == []
    await launcher.stop()


async def connected(state: Path) -> Launcher:
    async with asyncio.timeout(20):
        while True:
            try:
                return await Launcher.connect(state)
            except OSError:
                await asyncio.sleep(0.01)


async def test_a_launcher_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "launcher.sock").mkdir()
    with pytest.raises(Unavailable, match=r"launcher.sock"):
        await Launcher.connect_or_start(tmp_path)


async def test_a_pod_has_one_supervisor(node: Node) -> None:
    pod = await node.pod()
    with pytest.raises(AlreadyExists):
        await node.launcher.successor(pod.id, pod.directory)
    with pytest.raises(AlreadyExists):
        await node.launcher.fork(
            PodPlan(id=pod.id, directory=str(pod.directory), namespaces=["net"])
        )


async def test_a_pod_that_cannot_be_made_leaves_nothing(node: Node) -> None:
    with pytest.raises(FileNotFoundError):
        await node.launcher.fork(PodPlan(id="x", directory="/proc/1", namespaces=["net"]))
    assert await node.launcher.pods() == []


async def test_a_pod_that_was_given_up_is_not_made(node: Node) -> None:
    """The agent has removed its directory, before the launcher came to it."""
    directory = node.state / "pods" / "x"
    with pytest.raises(NotFound, match=f"{directory} is gone, so that nobody waits for it"):
        await node.launcher.fork(PodPlan(id="x", directory=str(directory), namespaces=["net"]))
    assert await node.launcher.pods() == []
    assert not directory.exists()


async def test_a_fork_whose_caller_is_cancelled_is_undone(node: Node) -> None:
    directory = node.state / "pods" / "x"
    directory.mkdir()
    plan = PodPlan(id="x", directory=str(directory), namespaces=["net"])
    forking = asyncio.create_task(node.launcher.fork(plan))
    await asyncio.sleep(0)
    forking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await forking
    assert await node.launcher.pods() == []


# ---- pods ----


async def test_namespaces_are_the_pods_own_and_pinned(node: Node) -> None:
    pod = await node.pod()
    for kind in ("net", "ipc", "uts"):
        own = os.stat(f"/proc/{pod.supervisor.pid}/ns/{kind}").st_ino
        assert own == os.stat(pod.directory / "ns" / kind).st_ino
        assert own != os.stat(f"/proc/self/ns/{kind}").st_ino
    assert os.path.samestat(
        os.stat(f"/proc/{pod.supervisor.pid}/ns/mnt"), os.stat("/proc/self/ns/mnt")
    )


async def test_namespaces_that_are_not_listed_are_the_nodes(node: Node) -> None:
    pod = await node.pod(["ipc"])
    assert os.path.samestat(
        os.stat(f"/proc/{pod.supervisor.pid}/ns/net"), os.stat("/proc/self/ns/net")
    )
    assert not (pod.directory / "ns" / "net").exists()


async def test_a_route_socket_is_inside_the_pod(node: Node) -> None:
    pod = await node.pod()
    with await pod.supervisor.namespaces() as namespaces:
        assert os.fstat(namespaces.net).st_ino == os.stat(pod.directory / "ns" / "net").st_ino
        # RTM_GETLINK of all: a new namespace has the loopback device alone.
        namespaces.route.send(struct.pack("=IHHIIBBHiII", 32, 18, 0x301, 1, 0, 0, 0, 0, 0, 0, 0))
        assert b"lo\0" in namespaces.route.recv(65536)


async def test_hostname_sysctls_and_shm(node: Node) -> None:
    pod = await node.pod(
        hostname="web-0",
        sysctls={
            "net.ipv4.ip_forward": "1",
            "kernel.shm_rmid_forced": "1",
            "kernel.domainname": "here",
        },
        shm_bytes=1 << 20,
    )
    await pod.run("hostname; cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shm_rmid_forced")
    await pod.wait("main")
    await pod.run(
        "cd /proc/sys; cat kernel/hostname kernel/domainname net/ipv4/ip_unprivileged_port_start",
        "b",
    )
    await pod.wait("b")
    assert pod.log()[-2:] == ["1", "1"]
    assert pod.log("b") == ["web-0", "here", "0"]
    shm = pod.directory / "shared/shm"
    size = os.statvfs(shm)
    assert size.f_blocks * size.f_frsize == (1 << 20) + namespaces.FILES_BYTES
    assert stat.S_IMODE(shm.stat().st_mode) == 0o1777
    assert stat.S_IMODE((pod.directory / "shared").stat().st_mode) == 0o700
    assert socket.gethostname() != "web-0"


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("kernel.core_pattern", "|/bin/evil", InvalidArgument),
        ("net.ipv4.no_such", "1", Unsupported),
        ("net.ipv4.ip_forward", "nonsense", InvalidArgument),
    ],
)
async def test_sysctls_that_cannot_be_set(
    node: Node, name: str, value: str, error: type[Exception]
) -> None:
    pod = await node.pod()
    with pytest.raises(error, match=name):
        await pod.supervisor.configure(pod_settings(sysctls={name: value}))


async def test_a_hostname_of_the_node_is_not_changed(node: Node) -> None:
    pod = await node.pod(["ipc"])
    with pytest.raises(FailedPrecondition, match="host name"):
        await pod.supervisor.configure(pod_settings(hostname="evil"))


async def test_containers_share_a_pid_namespace(node: Node) -> None:
    pod = await node.pod(pid="pod")
    await pod.run("sleep 1000", "one", pid="pod")
    await pod.run("ps -o pid,comm,args; sleep 1000", "two", pid="pod")
    await eventually(lambda: len(pod.log("two")) >= 4)
    listing = "\n".join(pod.log("two"))
    assert "sleep 1000" in listing
    assert listing.splitlines()[1].split()[:2] == ["1", "pod"]


async def test_the_first_process_of_a_shared_namespace_has_nothing(node: Node) -> None:
    pod = await node.pod(pid="pod")
    mask = (1 << 41) - 1
    everything = dict.fromkeys(["bounding", "permitted", "effective", "inheritable"], mask)
    await pod.run(
        "ls /proc/1/root; ls /proc/1/fd; grep -e Cap[IPEA] -e Uid /proc/1/status",
        pid="pod",
        process={"capabilities": {**everything, "ambient": 0}},
    )
    await pod.wait("main")
    assert [line.split() for line in pod.log()] == [
        ["Uid:", *["65534"] * 4],
        *([f"Cap{name}:", "0" * 16] for name in ("Inh", "Prm", "Eff")),
        ["CapAmb:", "0" * 16],
    ]


async def test_a_container_may_see_the_processes_of_another(node: Node) -> None:
    pod = await node.pod()
    await pod.run("sleep 1000")
    await pod.run("ps; sleep 1001", "debugger", pid="target", pid_target="main")
    await eventually(lambda: any("sleep 1000" in line for line in pod.log("debugger")))
    await pod.supervisor.stop("main", signal.SIGTERM, 0)
    assert (await pod.wait("debugger"))["code"] == 137
    await pod.wait("main")
    with pytest.raises(FailedPrecondition, match="is exited, not running"):
        await pod.run("true", "late", pid="target", pid_target="main")
    with pytest.raises(NotFound):
        await pod.run("true", "lost", pid="target", pid_target="absent")


async def test_dialing_reaches_what_listens_in_the_pod(node: Node) -> None:
    pod = await node.pod(["ipc"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with await pod.supervisor.dial(port) as connection:
            accepted, _ = server.accept()
            with accepted:
                accepted.send(b"hello")
                assert await asyncio.get_running_loop().sock_recv(connection, 10) == b"hello"
    with pytest.raises(Unavailable, match=f"dial port {port}"):
        await pod.supervisor.dial(port)
    with pytest.raises(InvalidArgument, match="out of range"):
        await pod.supervisor.dial(70000)


# ---- containers ----


async def test_the_life_of_a_container(node: Node) -> None:
    pod = await node.pod()
    ends = []
    pod.supervisor.on_exit = lambda container, end: ends.append((container, end))
    plan = pod.plan("echo out; echo err >&2; printf unfinished; exit 3")
    made = await pod.supervisor.create(plan, NO_CGROUP)
    assert made.identity == {"uid": 0, "gid": 0, "groups": [0], "home": "/root"}
    assert not pod.log_path().exists()
    at = await pod.supervisor.start("main")
    end = await pod.wait("main")
    assert (end["code"], end["oom"]) == (3, False)
    assert end["at"] >= at
    await eventually(lambda: ends == [("main", end)])
    assert sorted(pod.records()) == [
        ("stderr", "F", "err"),
        ("stdout", "F", "out"),
        ("stdout", "P", "unfinished"),
    ]
    [state] = await pod.supervisor.state()
    assert (state.id, state.pid, state.exit) == ("main", made.pid, end)
    await pod.supervisor.remove("main")
    assert await pod.supervisor.state() == []
    assert list((pod.directory / "containers").iterdir()) == []
    assert list((pod.directory / "exits").iterdir()) == []


async def test_as_many_groups_as_the_kernel_allows(node: Node) -> None:
    """More than fit in a packet."""
    pod = await node.pod()
    process = {"user": user(groups=list(range(1, 65536)))}
    made = await pod.supervisor.create(pod.plan("id -G | wc -w", process=process), NO_CGROUP)
    assert made.identity["groups"] == list(range(65536))
    await pod.supervisor.start("main")
    await pod.wait("main")
    assert pod.log() == ["65536"]


async def test_the_log_is_there_though_nothing_is_written(node: Node) -> None:
    pod = await node.pod()
    await pod.run("sleep 1000")
    assert pod.log_path().read_bytes() == b""


async def test_containers_of_a_pod_live_side_by_side(node: Node) -> None:
    pod = await node.pod()
    names = [f"c{number}" for number in range(8)]
    await asyncio.gather(*(pod.run(f"echo {name}; exit {name[1:]}", name) for name in names))
    ends = await asyncio.gather(*(pod.wait(name) for name in names))
    assert [end["code"] for end in ends] == list(range(8))
    assert [pod.log(name) for name in names] == [[name] for name in names]


async def test_a_failed_creation_leaves_nothing(node: Node) -> None:
    pod = await node.pod()
    plan = pod.plan("true", process={"cwd": "/bin/sh"})
    before = os.listdir(f"/proc/{pod.supervisor.pid}/fd")
    with pytest.raises(FailedPrecondition, match='"/bin/sh": Not a directory'):
        await pod.supervisor.create(plan, NO_CGROUP)
    assert await pod.supervisor.state() == []
    assert list((pod.directory / "containers").iterdir()) == []
    assert len(os.listdir(f"/proc/{pod.supervisor.pid}/fd")) == len(before)
    assert children(pod.supervisor.pid) == []
    await pod.run("exit 0")


async def test_a_name_is_taken_once(node: Node) -> None:
    pod = await node.pod()
    await pod.run("sleep 1000")
    with pytest.raises(AlreadyExists):
        await pod.supervisor.create(pod.plan("true"), NO_CGROUP)
    assert (await pod.supervisor.state())[0].exit is None


async def test_a_creation_that_was_given_up_is_undone_by_remove(node: Node) -> None:
    pod = await node.pod()
    creating = asyncio.create_task(pod.supervisor.create(pod.plan("true"), NO_CGROUP))
    await asyncio.sleep(0)
    creating.cancel()
    await pod.supervisor.remove("main")
    assert await pod.supervisor.state() == []
    assert children(pod.supervisor.pid) == []


@pytest.mark.parametrize("argv", [["/absent"], ["absent"], ["/etc/passwd"]])
async def test_a_program_that_cannot_be_executed(node: Node, argv: list[str]) -> None:
    pod = await node.pod()
    await pod.supervisor.create(pod.plan(argv), NO_CGROUP)
    with pytest.raises(StartError, match=argv[0]):
        await pod.supervisor.start("main")
    end = await pod.wait("main")
    assert end["code"] == 128
    assert pod.log_path().exists()


async def test_a_container_is_started_once(node: Node) -> None:
    pod = await node.pod()
    await pod.run("sleep 1000")
    with pytest.raises(FailedPrecondition, match="is running, not created"):
        await pod.supervisor.start("main")


async def test_a_log_that_cannot_be_opened_leaves_the_container_created(node: Node) -> None:
    pod = await node.pod()
    path = pod.log_path()
    path.mkdir(parents=True)
    await pod.supervisor.create(pod.plan("echo hello"), NO_CGROUP)
    with pytest.raises(FailedPrecondition, match="Is a directory"):
        await pod.supervisor.start("main")
    path.rmdir()
    await pod.supervisor.start("main")
    await pod.wait("main")
    assert pod.log() == ["hello"]


@pytest.mark.parametrize(("command", "code"), [("kill -9 $$", 0), ("exec sleep 1000", 128 + 15)])
async def test_codes_of_signals(node: Node, command: str, code: int) -> None:
    pod = await node.pod(["ipc"])
    pid = await pod.run(command, pid="node")
    if code:
        os.kill(pid, signal.SIGTERM)
    assert (await pod.wait("main"))["code"] == (code or 137)


async def test_what_is_unknown_is_not_found(node: Node) -> None:
    pod = await node.pod()
    for call in (
        pod.supervisor.start("x"),
        pod.supervisor.stop("x", 15, 0),
        pod.supervisor.reopen_log("x"),
        pod.supervisor.attach("x"),
    ):
        with pytest.raises(NotFound):
            await call
    await pod.supervisor.remove("x")


# ---- stopping ----


async def test_a_stop_signals_once_and_keeps_the_earliest_deadline(node: Node) -> None:
    pod = await node.pod()
    await pod.run("trap 'echo TERM' TERM; echo ready; while :; do sleep 0.05; done")
    await eventually(lambda: pod.log() == ["ready"])
    loop = asyncio.get_running_loop()
    began = loop.time()
    await pod.supervisor.stop("main", signal.SIGTERM, 60_000)
    await pod.supervisor.stop("main", signal.SIGTERM, 300)
    await pod.supervisor.stop("main", signal.SIGTERM, 50_000)
    assert (await pod.wait("main"))["code"] == 137
    assert 0.25 < loop.time() - began < 40
    assert pod.log() == ["ready", "TERM"]


async def test_a_program_may_end_at_its_signal(node: Node) -> None:
    pod = await node.pod()
    await pod.run("trap 'exit 5' TERM; echo ready; while :; do sleep 0.05; done")
    await eventually(lambda: pod.log() == ["ready"])
    await pod.supervisor.stop("main", signal.SIGTERM, 60_000)
    assert (await pod.wait("main"))["code"] == 5
    await pod.supervisor.stop("main", signal.SIGTERM, 60_000)


async def test_a_stop_without_patience_kills(node: Node) -> None:
    pod = await node.pod()
    await pod.run("trap '' TERM; sleep 1000")
    await pod.supervisor.stop("main", signal.SIGTERM, 0)
    end = await pod.wait("main")
    assert (end["code"], end["oom"]) == (137, False)


async def test_a_deadline_is_kept_without_an_agent(node: Node) -> None:
    pod = await node.pod()
    pid = await pod.run("trap '' TERM; while :; do sleep 0.05; done")
    await pod.supervisor.stop("main", signal.SIGTERM, 200)
    pod.supervisor.close()
    await eventually(lambda: not exists(pid))
    await pod.reconnect()
    [state] = await pod.supervisor.state()
    assert state.exit is not None
    assert state.exit["code"] == 137


async def test_a_container_that_was_never_started_is_removed(node: Node) -> None:
    pod = await node.pod()
    await pod.supervisor.create(pod.plan("true"), NO_CGROUP)
    await pod.supervisor.remove("main")
    assert await pod.supervisor.state() == []
    await pod.supervisor.create(pod.plan("true"), NO_CGROUP)
    await pod.supervisor.stop("main", signal.SIGTERM, 60_000)
    assert (await pod.wait("main"))["code"] == 137


async def test_a_shutdown_ends_everything(node: Node) -> None:
    pod = await node.pod(pid="pod")
    await pod.run("sleep 1000", "one")
    await pod.run("trap '' TERM; sleep 1000", "two", pid="pod")
    await pod.supervisor.create(pod.plan("true", "three"), NO_CGROUP)
    handle = await pod.exec("sleep 1000", "one")
    pid = pod.supervisor.pid
    await pod.supervisor.shutdown()
    assert (await handle.wait()).code == 137
    await eventually(lambda: not exists(pid))
    assert mounts_below(pod.directory) == []
    await pod.supervisor.shutdown()


# ---- agents ----


async def test_the_last_agent_is_told(node: Node) -> None:
    pod = await node.pod()
    await pod.run("sleep 1000")
    first = pod.supervisor
    pod.supervisor = await Supervisor.connect(pod.directory, pod.id)
    ends = []
    pod.supervisor.on_exit = lambda container, _end: ends.append(container)
    await pod.supervisor.stop("main", signal.SIGKILL, 0)
    await pod.wait("main")
    await eventually(lambda: ends == ["main"])
    with pytest.raises(Unavailable):
        await first.state()
    assert not first.is_lost
    first.close()


async def test_a_big_plan_passes(node: Node) -> None:
    pod = await node.pod()
    env = [f"V{number}={'x' * 1000}" for number in range(500)]
    await pod.run("echo ${#V499}", process={"env": env})
    await pod.wait("main")
    assert pod.log() == ["1000"]


async def test_malformed_messages_are_answered(node: Node) -> None:
    pod = await node.pod()
    await pod.run("sleep 1000")
    pod.supervisor.close()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        with protocol.address(str(pod.directory / "supervisor.sock")) as address:
            connection.connect(address)
        for packet in (
            b"{",
            b"[]",
            b"{}",
            b'{"id": 1, "op": "explode"}',
            b'{"id": 1, "op": ["state"]}',
            b'{"id": 1, "op": "create", "plan": 7}',
            b'{"id": 1, "op": "stop", "container": "main", "signal": "x", "timeout_ms": "y"}',
            b'{"id": 1, "op": "stop", "container": "main", "signal": 999, "timeout_ms": 1}',
            b'{"id": 1, "op": "start", "container": {}}',
            b'{"id": 1, "op": "dial", "port": null}',
            b'{"id": 1, "op": "configure", "settings": {"sysctls": 5}}',
            b'{"id": 1, "op": "exec", "exec": 1, "container": "main", "plan": {}}',
        ):
            connection.send(packet)
            message = protocol.receive(connection)
            assert message is not None
            assert message.body["error"] in ("InvalidArgument", "NotFound", "OSError"), message
    await pod.reconnect()
    [state] = await pod.supervisor.state()
    assert state.exit is None
