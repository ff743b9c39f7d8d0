"""Requests to a process that stands still, that loses an answer, or that ends the connection and lives."""

import asyncio
import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nodeagent.errors import ResourceExhausted, Unavailable
from nodeagent.sandbox import protocol
from nodeagent.sandbox.agent import channel as channel_module
from nodeagent.sandbox.agent import deadlines
from nodeagent.sandbox.agent.channel import Channel
from nodeagent.sandbox.agent.connector import SOCKETS, ignore_end, ignore_event
from tests.support.faults import until

# Answers "hello" and "state" at once, "namespaces" with a descriptor, "list" without a number, "create" never.
PROCESS = """
import array, json, os, socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
    listener.bind(sys.argv[1])
    listener.listen()
    print(flush=True)
    while True:
        connection, _ = listener.accept()
        while packet := connection.recv(65536):
            asked, rights, result = json.loads(packet), [], {"version": 1, "oldest": 0}
            if asked["op"] == "create":
                continue
            if asked["op"] == "namespaces":
                result = {"fds": ["net"]}
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))]
            number = None if asked["op"] == "list" else asked["id"]
            connection.sendmsg([json.dumps({"id": number, "result": result}).encode()], rights)
"""


@pytest.fixture
def process(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "socket")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


@pytest.fixture
async def channel(
    process: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Channel]:
    """A channel to the process, which has a moment to answer what is answered at once."""
    monkeypatch.setattr(deadlines, "SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(deadlines, "SECONDS", {**deadlines.SECONDS, "state": 0.4})
    made = await SOCKETS.connect(
        str(tmp_path / "socket"), 'supervisor of pod "a"', ignore_event, ignore_end
    )
    yield made
    made.forget()


@contextmanager
def stopped(process: subprocess.Popen[bytes]) -> Iterator[None]:
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


async def test_a_stopped_process_is_named_with_the_remedy_and_said_once(
    channel: Channel, process: subprocess.Popen[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    await channel.agree()
    caplog.set_level("INFO")
    pid = process.pid
    silent = (
        f'process {pid} does not answer: it is stopped (state T); resume it with "kill -CONT {pid}"'
    )
    with stopped(process):
        for _ in range(2):
            with pytest.raises(TimeoutError) as raised:
                await channel.request("state")
            assert str(raised.value) == f'supervisor of pod "a": "state": {silent}'
        assert channel.silent == silent
    await until(lambda: not channel.silent)
    assert caplog.messages == [
        f'supervisor of pod "a": {silent}',
        f'supervisor of pod "a": process {pid} answers again',
    ]


async def test_silence_is_noticed_long_before_a_long_request_is_overdue(
    channel: Channel, process: subprocess.Popen[bytes]
) -> None:
    await channel.agree()
    with stopped(process):
        creation = asyncio.create_task(channel.request("create"))
        await until(lambda: channel.silent)
        assert not creation.done()
    await until(lambda: not channel.silent)
    creation.cancel()
    await asyncio.wait([creation])


async def test_silence_is_noticed_though_the_caller_has_given_up(
    channel: Channel, process: subprocess.Popen[bytes]
) -> None:
    """Also where it was asked something else just before, and had answered that."""
    await channel.request("state")
    with stopped(process):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await channel.request("create")
        await until(lambda: channel.silent)


async def test_what_takes_long_is_no_silence(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadlines, "SECONDS", {"create": 1.0})
    with pytest.raises(TimeoutError) as raised:
        await channel.request("create", container="c")
    assert str(raised.value) == (
        'supervisor of pod "a": "create" of container "c" has not been done within 1 s; it goes on'
    )
    assert channel.silent == ""


async def test_a_process_that_does_not_even_say_hello(
    process: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadlines, "QUICK_SECONDS", 0.1)
    with stopped(process):
        path = str(tmp_path / "socket")
        channel = await SOCKETS.connect(path, "launcher", ignore_event, ignore_end)
        with pytest.raises(TimeoutError, match=r'launcher: "hello": .* is stopped'):
            await channel.request("create")
        assert channel.silent
    channel.forget()


async def test_a_reply_that_has_lost_its_descriptors_fails_alone(channel: Channel) -> None:
    await channel.agree()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        with pytest.raises(ResourceExhausted, match=r'pod "a": the receiver has no descriptors'):
            await channel.request("namespaces")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    await channel.request("state")
    reply = await channel.request("namespaces")
    os.close(reply.fds["net"])


async def test_an_answer_to_no_request_ends_the_connection_not_the_process(
    channel: Channel, process: subprocess.Popen[bytes]
) -> None:
    with pytest.raises(Unavailable, match="disconnected"):
        await channel.request("list")
    assert channel.ended.is_set()
    assert not channel.lost.is_set()
    assert process.poll() is None


@pytest.mark.parametrize("is_killed", [True, False])
async def test_who_waits_for_room_is_told_of_the_end(
    channel: Channel, process: subprocess.Popen[bytes], is_killed: bool
) -> None:
    """The other process's, or that the agent disconnects."""
    await channel.agree()
    with stopped(process):
        waiting = [
            asyncio.create_task(channel.request("create", text="x" * 30_000)) for _ in range(20)
        ]
        await until(lambda: channel._sending.locked() and not channel._room.is_set())
        process.kill() if is_killed else channel.close()
        await asyncio.wait(waiting)
    assert {type(task.exception()) for task in waiting} == {Unavailable}


async def test_a_process_that_does_not_die_is_not_waited_for(
    channel: Channel, process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "_KILL_SECONDS", 0.05)
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda _pidfd, _number: None)
    with pytest.raises(TimeoutError, match=f"process {process.pid} does not die of SIGKILL: it"):
        await channel.kill()


async def test_a_hello_that_cannot_be_sent_is_no_silence(
    process: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher that does not answer is killed: a shortage of the agent is not its fault."""

    def send(*_: object) -> None:
        raise OSError(errno.ENOBUFS, "No buffer space available")

    monkeypatch.setattr(protocol, "send", send)
    with pytest.raises(OSError, match="No buffer space"):
        await SOCKETS.connect(str(tmp_path / "socket"), "launcher", ignore_event, ignore_end)


async def test_who_is_disconnected_is_not_silent(
    channel: Channel, caplog: pytest.LogCaptureFixture
) -> None:
    await channel.agree()
    channel.close()
    with pytest.raises(Unavailable, match="disconnected"):
        await channel.request("state")
    await asyncio.sleep(2 * deadlines.SILENCE_SECONDS)
    assert channel.silent == ""
    assert not caplog.records


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.EAGAIN])
async def test_what_is_posted_is_sent_in_order_until_that_succeeds(
    channel: Channel, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Or a command that is to be killed would run for good."""
    sent: list[str] = []
    failures = [OSError(number, os.strerror(number))] * 2

    def send(_connection: object, packet: bytes) -> None:
        if failures:
            raise failures.pop()
        sent.append(json.loads(packet)["op"])

    await channel.agree()
    monkeypatch.setattr(channel_module, "_POST_AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(protocol, "send", send)
    channel.post("exec_kill", exec=1)
    channel.post("detach", attach=2)
    channel.post("end_input", attach=3)
    assert sent == []
    await until(lambda: len(sent) == 3)
    assert sent == ["exec_kill", "detach", "end_input"]


async def test_what_is_posted_to_nobody_is_not_sent_again(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_connection: object, _packet: bytes) -> None:
        raise OSError(errno.EPIPE, "Broken pipe")

    await channel.agree()
    monkeypatch.setattr(protocol, "send", fail)
    channel.post("detach", attach=2)
    assert channel._post_again is not None
    channel.close()
    assert channel._post_again.cancelled()


async def test_a_process_that_its_parent_has_reaped_is_dead(
    channel: Channel, process: subprocess.Popen[bytes]
) -> None:
    process.kill()
    process.wait()
    await channel.kill()
    assert channel.lost.is_set()
