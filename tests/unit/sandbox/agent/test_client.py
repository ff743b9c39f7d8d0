"""The agent's side of supervisors of other releases."""

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nodeagent.errors import IncompatibleVersion, Unavailable, Unsupported
from nodeagent.sandbox import protocol
from nodeagent.sandbox.agent import client as client_module
from nodeagent.sandbox.agent import deadlines
from nodeagent.sandbox.agent.client import ExecIO, Launcher, Supervisor
from nodeagent.sandbox.agent.connector import Sockets
from nodeagent.sandbox.agent.handles import CgroupFds
from nodeagent.sandbox.paths import LAUNCHER_SOCKET, SUPERVISOR_SOCKET
from nodeagent.sandbox.spec import ExecPlan

NO_CGROUP = CgroupFds(join=[], oom=None, procs=None, kill=None)


class Earlier:
    """Answers one exec with the master of its terminal, and keeps what is said next."""

    def __init__(self, directory: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(directory / SUPERVISOR_SOCKET))
        self._listener.listen()
        self.next: dict[str, Any] = {}
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        master, self.other_end = os.pipe()
        with self._listener, connection, open(master, "rb"):
            hello = protocol.receive(connection)
            assert hello is not None
            unknown = {"error": "InvalidArgument", "text": "operation 'hello': unknown"}
            protocol.send(connection, protocol.encode({"id": hello.body["id"], **unknown}))
            asked = protocol.receive(connection)
            assert asked is not None
            result = {"pid": 1, "fds": ["master"]}
            packet = protocol.encode({"id": asked.body["id"], "result": result})
            protocol.send(connection, packet, [master])
            said = protocol.receive(connection)
            assert said is not None
            self.next = dict(said.body)


async def test_a_terminal_that_the_agent_would_hold_is_refused(tmp_path: Path) -> None:
    earlier = Earlier(tmp_path)
    client = await Supervisor.connect(tmp_path, "pod")
    with pytest.raises(Unsupported, match=r'container "c": .* recreate the pod'):
        await client.exec(cast(ExecPlan, {"container": "c"}), ExecIO(), NO_CGROUP)
    await asyncio.to_thread(earlier.thread.join)
    assert earlier.next["op"] == "exec_kill"
    with pytest.raises(BrokenPipeError):  # nobody has the terminal open
        os.write(earlier.other_end, b"x")
    os.close(earlier.other_end)
    client.close()


class Other:
    """Answers hello with what another release says of itself, after an event; keeps what it hears."""

    def __init__(self, directory: Path, says: dict[str, Any]) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(directory / SUPERVISOR_SOCKET))
        self._listener.listen()
        self._says = says
        self.heard: list[dict[str, Any]] = []
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with self._listener, connection:
            event = {"event": "exit", "container": "c", "exit": "in a form of its own"}
            protocol.send(connection, protocol.encode(event))
            while message := protocol.receive(connection):
                self.heard.append(dict(message.body))
                protocol.send(
                    connection, protocol.encode({"id": message.body["id"], "result": self._says})
                )


async def test_a_supervisor_of_a_release_too_new_is_asked_nothing(tmp_path: Path) -> None:
    other = Other(tmp_path, {"version": 9, "oldest": 8})
    client = await Supervisor.connect(tmp_path, "abc")
    told: list[str] = []
    client.on_exit = lambda container, _exit: told.append(container)
    for _ in range(2):
        with pytest.raises(
            IncompatibleVersion,
            match=r'pod "abc" speaks version 8 to 9 of the protocol, this agent 0 to 1; install .* remove the pod',
        ):
            await client.state()
    client.close()
    await asyncio.to_thread(other.thread.join)
    assert other.heard == [{"id": 0, "op": "hello", "version": 1, "oldest": 0}]
    assert told == []


async def test_a_newer_supervisor_that_speaks_our_version_is_served(tmp_path: Path) -> None:
    other = Other(tmp_path, {"version": 9, "oldest": 1, "containers": []})
    client = await Supervisor.connect(tmp_path, "abc")
    assert await client.state() == []
    client.close()
    await asyncio.to_thread(other.thread.join)
    assert [asked["op"] for asked in other.heard] == ["hello", "state"]


@pytest.mark.usefixtures("nonsense")
async def test_what_is_disconnected_and_lives_ends_with_its_pod(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It serves nobody; until the agent's next start, its pod could be neither stopped nor removed."""
    monkeypatch.setattr(client_module, "_DEATH_SECONDS", 0.01)
    monkeypatch.setattr(deadlines, "QUICK_SECONDS", 0.1)
    abandoned: list[str] = []

    async def abandon(pod_id: str) -> None:
        abandoned.append(pod_id)

    async def launcher(*_: object) -> Any:
        return SimpleNamespace(abandon=abandon, close=lambda: None)

    monkeypatch.setattr(Launcher, "connect", launcher)
    client = await Supervisor.connect(tmp_path, "abc")
    await client.shutdown()
    assert client.is_lost
    assert abandoned == ["abc"]


NONSENSE = """
import signal, socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
    listener.bind(sys.argv[1])
    listener.listen()
    print(flush=True)
    connection, _ = listener.accept()
    connection.send(b"nonsense")
    signal.pause()
"""


@pytest.fixture
def nonsense(tmp_path: Path) -> Iterator[None]:
    """A supervisor of its own process, which says what nobody understands."""
    command = [sys.executable, "-c", NONSENSE, str(tmp_path / SUPERVISOR_SOCKET)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield
        process.kill()


async def test_what_says_an_impossible_version_is_disconnected(tmp_path: Path) -> None:
    other = Other(tmp_path, {"version": 1, "oldest": 2})
    client = await Supervisor.connect(tmp_path, "abc")
    with pytest.raises(Unavailable, match="disconnected"):
        await client.state()
    client.close()
    await asyncio.to_thread(other.thread.join)


# A launcher that has died, and that nobody reaps; a child that it was just making holds its socket for another moment.
DYING = """
import os, socket, sys
listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listener.bind(sys.argv[1])
if os.fork() == 0:
    listener.listen()
    if os.fork():
        os._exit(0)
    os.read(0, 1)
    os._exit(0)
os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
print("died", flush=True)
os.read(0, 1)
"""


@pytest.fixture
def dying(tmp_path: Path) -> Iterator[Path]:
    """The state directory of this launcher."""
    command = [sys.executable, "-c", DYING, str(tmp_path / LAUNCHER_SOCKET)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"died\n"
        yield tmp_path


class Starting(Sockets):
    """Has another launcher listen when it is asked for one."""

    def __init__(self) -> None:
        self.started = 0
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    async def start_launcher(self, state: str, python: str, join_fds: Sequence[int]) -> None:
        self.started += 1
        os.unlink(f"{state}/{LAUNCHER_SOCKET}")
        self.listener.bind(f"{state}/{LAUNCHER_SOCKET}")
        self.listener.listen()


async def test_a_launcher_that_is_dying_is_not_taken_for_one_that_runs(dying: Path) -> None:
    starting = Starting()
    with starting.listener:
        launcher = await Launcher.connect_or_start(dying, connector=starting)
        assert starting.started == 1
        assert launcher.pid == os.getpid()
        assert not launcher.ended.is_set()
        launcher.close()


async def test_a_launcher_that_lives_and_hangs_up_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has pods: nothing else is started beside it, and it is not killed."""
    monkeypatch.setattr(client_module, "_MOMENT_SECONDS", 0.01)

    def hang_up() -> None:
        connection, _ = listener.accept()
        connection.recv(4096)  # what it is greeted with; before that nobody seems to listen
        connection.close()

    starting = Starting()
    with starting.listener, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / LAUNCHER_SOCKET))
        listener.listen()
        hanging_up = threading.Thread(target=hang_up)
        hanging_up.start()
        with pytest.raises(Unavailable, match="launcher: is disconnected"):
            await Launcher.connect_or_start(tmp_path, connector=starting)
        hanging_up.join()
    assert not starting.started
