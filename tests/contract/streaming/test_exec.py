"""One suite for exec over every version of both wires."""

import asyncio
import os
import random
import signal

import pytest

from nodeagent.streaming import session
from nodeagent.streaming.backend import ExecRequest
from nodeagent.streaming.remotecommand import Channel
from nodeagent.streaming.server import StreamingServer
from nodeagent.tasks import Tasks
from tests.contract.streaming.children import Children
from tests.contract.streaming.clients import (
    COMMAND_WIRES,
    CommandClient,
    SpdyCommand,
    connect_command,
)
from tests.contract.streaming.waiting import eventually, until_blocked

STATUS_WIRES = [wire for wire in COMMAND_WIRES if " v4" in wire or " v5" in wire]
TEXT_WIRES = [wire for wire in COMMAND_WIRES if wire not in STATUS_WIRES]
EOF_WIRES = [wire for wire in COMMAND_WIRES if wire.startswith("spdy") or " v5" in wire]
MAIN_WIRES = ["spdy v4.channel.k8s.io", "websocket v5.channel.k8s.io"]


def sh(
    script: str, *, stdin: bool = False, stdout: bool = True, stderr: bool = True, tty: bool = False
) -> ExecRequest:
    return ExecRequest(
        container_id="c",
        command=("sh", "-c", script),
        stdin=stdin,
        stdout=stdout,
        stderr=stderr and not tty,
        tty=tty,
    )


async def start(server: StreamingServer, wire: str, request: ExecRequest) -> CommandClient:
    return await connect_command(wire, server.url(request), request)


# --- output and exit codes ---


@pytest.mark.parametrize("wire", COMMAND_WIRES)
async def test_output_on_both_streams(server: StreamingServer, wire: str) -> None:
    client = await start(server, wire, sh("echo out; echo err >&2"))
    result = await client.result()
    assert (result.stdout, result.stderr) == (b"out\n", b"err\n")


@pytest.mark.parametrize("wire", STATUS_WIRES)
@pytest.mark.parametrize(("script", "code"), [("true", 0), ("exit 7", 7), ("kill -9 $$", 137)])
async def test_exit_codes(server: StreamingServer, wire: str, script: str, code: int) -> None:
    result = await (await start(server, wire, sh(script))).result()
    assert result.code == code


@pytest.mark.parametrize("wire", TEXT_WIRES)
async def test_old_versions_tell_only_failures(server: StreamingServer, wire: str) -> None:
    assert (await (await start(server, wire, sh("true"))).result()).status == ""
    result = await (await start(server, wire, sh("exit 7"))).result()
    assert result.status == "command terminated with exit code 7"


@pytest.mark.parametrize("wire", MAIN_WIRES)
async def test_only_the_streams_that_were_asked_for(server: StreamingServer, wire: str) -> None:
    request = sh("echo out; echo err >&2", stdout=False)
    result = await (await start(server, wire, request)).result()
    assert (result.stdout, result.stderr, result.code) == (b"", b"err\n", 0)


@pytest.mark.parametrize("wire", MAIN_WIRES)
async def test_a_process_that_cannot_start(server: StreamingServer, wire: str) -> None:
    request = ExecRequest(container_id="stopped", command=("x",), stdout=True)
    status = (await (await start(server, wire, request)).result()).status
    assert status["status"] == "Failure"
    assert status["reason"] == "InternalError"
    assert status["message"] == 'container "stopped": not running'


@pytest.mark.parametrize("wire", MAIN_WIRES)
async def test_a_program_that_is_not_there(server: StreamingServer, wire: str) -> None:
    request = ExecRequest(container_id="c", command=("/no/such/program",), stdout=True)
    status = (await (await start(server, wire, request)).result()).status
    assert "No such file or directory: '/no/such/program'" in status["message"]


async def test_spdy_ends_the_output_before_the_error_stream(server: StreamingServer) -> None:
    client = await start(server, MAIN_WIRES[0], sh("echo x"))
    assert isinstance(client, SpdyCommand)
    await client.result()
    assert client.ended == [Channel.STDOUT, Channel.STDERR, Channel.ERROR]


@pytest.mark.parametrize("wire", MAIN_WIRES)
async def test_who_keeps_the_pipe_keeps_nobody_waiting(server: StreamingServer, wire: str) -> None:
    client = await start(server, wire, sh("sleep 1000 & echo $!; exit 3"))
    result = await client.result()
    assert result.code == 3
    os.kill(int(result.stdout), signal.SIGKILL)  # it lives, and so the pipe has not ended


@pytest.mark.parametrize("wire", MAIN_WIRES)
async def test_output_is_whole_though_its_writer_has_ended(
    server: StreamingServer, wire: str
) -> None:
    """What is left in the pipe of a process that ended comes through to a client that reads late."""
    client = await start(server, wire, sh("head -c 50000 /dev/zero; sleep 30 & exit 0"))
    await asyncio.sleep(0.6)
    result = await client.result()
    assert (result.stdout, result.code) == (bytes(50000), 0)


# --- input ---


@pytest.mark.parametrize("wire", EOF_WIRES)
async def test_input_and_its_end(server: StreamingServer, wire: str) -> None:
    client = await start(server, wire, sh("cat; echo end", stdin=True))
    await client.write_all(b"one two")
    assert (await client.result()).stdout == b"one twoend\n"


@pytest.mark.parametrize("wire", [wire for wire in COMMAND_WIRES if wire not in EOF_WIRES])
async def test_input_without_an_end(server: StreamingServer, wire: str) -> None:
    client = await start(server, wire, sh("read line; echo got $line", stdin=True))
    await client.write(b"one two\n")
    assert (await client.result()).stdout == b"got one two\n"


@pytest.mark.parametrize("wire", EOF_WIRES)
async def test_bytes_of_all_kinds_in_both_directions(server: StreamingServer, wire: str) -> None:
    data = random.Random(1).randbytes(8 << 20)
    client = await start(server, wire, sh("cat", stdin=True))
    _, result = await asyncio.gather(client.write_all(data), client.result())
    assert result.stdout == data
    assert result.code == 0 if wire in STATUS_WIRES else result.status == ""


@pytest.mark.parametrize("wire", MAIN_WIRES)
async def test_small_messages(server: StreamingServer, wire: str) -> None:
    client = await start(server, wire, sh("cat", stdin=True))
    _, result = await asyncio.gather(client.write_all(b"ab" * 2000, size=1), client.result())
    assert result.stdout == b"ab" * 2000


@pytest.mark.parametrize("wire", MAIN_WIRES)
async def test_input_that_nobody_reads_blocks_nobody(server: StreamingServer, wire: str) -> None:
    client = await start(server, wire, sh("exec <&-; echo closed; sleep 0.5; echo end", stdin=True))
    await client.expect(b"closed\n")
    _, result = await asyncio.gather(client.write_all(bytes(4 << 20)), client.result())
    assert (result.stdout, result.code) == (b"end\n", 0)


# --- the pace of either side ---


@pytest.mark.parametrize("wire", MAIN_WIRES)
async def test_a_slow_client_slows_the_process(
    server: StreamingServer, backend: Children, wire: str
) -> None:
    client = await start(server, wire, sh("head -c 50000000 /dev/zero"))
    await asyncio.sleep(0.5)
    assert backend.execs[0].process.returncode is None
    result = await client.result()
    assert (len(result.stdout), result.code) == (50_000_000, 0)


@pytest.mark.parametrize("wire", MAIN_WIRES)
async def test_a_slow_process_slows_the_client(server: StreamingServer, wire: str) -> None:
    client = await start(server, wire, sh("sleep 0.7; cat | wc -c", stdin=True))
    written = await until_blocked(client.write)
    assert written < 40_000_000
    await client.end_input()
    assert int((await client.result()).stdout) >= written


@pytest.mark.parametrize("wire", MAIN_WIRES)
async def test_who_is_not_read_from_can_still_leave(
    server: StreamingServer, backend: Children, wire: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "HANGUP_CHECK_S", 0.05)
    client = await start(server, wire, sh("sleep 30", stdin=True))
    await until_blocked(client.write)
    client.writer.transport.abort()
    await eventually(lambda: backend.execs[0].closed)


# --- terminals ---


@pytest.mark.parametrize("wire", COMMAND_WIRES)
async def test_a_terminal(server: StreamingServer, wire: str) -> None:
    client = await start(
        server, wire, sh("test -t 0 && test -t 1 && read x && echo $x-$x", stdin=True, tty=True)
    )
    await client.write(b"hey\r")
    result = await client.result()
    assert result.stdout == b"hey\r\nhey-hey\r\n"


@pytest.mark.parametrize("wire", ["spdy v3.channel.k8s.io", *STATUS_WIRES])
async def test_the_first_size_is_there_before_the_process(
    server: StreamingServer, backend: Children, wire: str
) -> None:
    client = await start(server, wire, sh("stty size", stdin=True, tty=True))
    await client.resize(91, 37)
    assert (await client.result()).stdout == b"37 91\r\n"
    assert backend.sizes == [(91, 37)]


@pytest.mark.parametrize("wire", MAIN_WIRES)
async def test_a_client_without_a_size_is_not_waited_for(
    server: StreamingServer, backend: Children, wire: str
) -> None:
    client = await start(server, wire, sh("echo x", stdin=True, tty=True))
    assert (await client.result()).stdout == b"x\r\n"
    assert backend.sizes == [None]


@pytest.mark.parametrize("wire", MAIN_WIRES)
async def test_a_terminal_is_resized(server: StreamingServer, wire: str) -> None:
    script = "trap 'stty size' WINCH; echo ready; while :; do sleep 0.05; done"
    client = await start(server, wire, sh(script, stdin=True, tty=True))
    await client.resize(80, 24)
    await client.expect(b"ready\r\n")
    await client.resize(100, 40)
    await client.expect(b"40 100\r\n")
    await client.close()


@pytest.mark.parametrize("wire", MAIN_WIRES)
async def test_control_c_is_a_signal(server: StreamingServer, wire: str) -> None:
    script = "trap 'exit 7' INT; echo ready; while :; do sleep 0.05; done"
    client = await start(server, wire, sh(script, stdin=True, tty=True))
    await client.expect(b"ready\r\n")
    await client.write(b"\x03")
    assert (await client.result()).code == 7


# --- ends ---


@pytest.mark.parametrize("wire", MAIN_WIRES)
async def test_a_client_that_leaves(server: StreamingServer, backend: Children, wire: str) -> None:
    client = await start(server, wire, sh("echo ready; cat", stdin=True))
    await client.expect(b"ready\n")
    await client.close()
    await eventually(lambda: backend.execs[0].closed)
    assert await backend.execs[0].wait() == 0  # its input has ended


@pytest.mark.parametrize("wire", MAIN_WIRES)
async def test_a_terminal_hangs_up_when_the_client_leaves(
    server: StreamingServer, backend: Children, wire: str
) -> None:
    client = await start(server, wire, sh("echo ready; sleep 30", stdin=True, tty=True))
    await client.expect(b"ready\r\n")
    await client.close()
    assert await asyncio.wait_for(backend.execs[0].wait(), 60) == 129


async def test_a_client_that_does_not_make_its_streams(
    server: StreamingServer, backend: Children
) -> None:
    request = sh("echo x", stdin=True)
    fewer = sh("echo x", stdin=False)
    client = await connect_command(MAIN_WIRES[0], server.url(request), fewer)
    assert (await client.result()).stdout == b""
    assert backend.execs == []


@pytest.mark.parametrize("wire", MAIN_WIRES)
async def test_the_end_of_the_server_ends_its_sessions(backend: Children, wire: str) -> None:
    async with StreamingServer(backend, Tasks()) as server:
        client = await start(server, wire, sh("echo ready; cat", stdin=True))
        await client.expect(b"ready\n")
    assert backend.execs[0].closed
    assert (await client.result()).stdout == b""
