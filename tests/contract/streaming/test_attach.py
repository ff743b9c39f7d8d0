"""One suite for attach over both wires."""

import asyncio

import pytest

from nodeagent.streaming.backend import AttachRequest
from nodeagent.streaming.remotecommand import Channel
from nodeagent.streaming.server import StreamingServer
from tests.contract.streaming.children import Children
from tests.contract.streaming.clients import CommandClient, connect_command
from tests.contract.streaming.waiting import eventually

WIRES = ["spdy v4.channel.k8s.io", "websocket v5.channel.k8s.io"]
ECHO = ("sh", "-c", "while read line; do echo got $line; done; echo bye; exit 3")


async def attach(
    server: StreamingServer, wire: str, *, stdin: bool = False, stderr: bool = False
) -> CommandClient:
    request = AttachRequest(container_id="c", stdin=stdin, stdout=True, stderr=stderr)
    return await connect_command(wire, server.url(request), request)


@pytest.mark.parametrize("wire", WIRES)
async def test_what_comes_from_now_on(
    server: StreamingServer, backend: Children, wire: str
) -> None:
    container = await backend.run("c", *ECHO)
    assert container.process.stdin is not None
    container.process.stdin.write(b"before\n")
    await asyncio.sleep(0.1)
    client = await attach(server, wire, stdin=True)
    await eventually(lambda: bool(container.attachments))
    await client.write(b"after\n")
    await client.expect(b"got after\n")
    assert client.received[Channel.STDOUT] == b""
    await client.close()


@pytest.mark.parametrize("wire", WIRES)
async def test_nothing_is_echoed(server: StreamingServer, backend: Children, wire: str) -> None:
    await backend.run("c", "sh", "-c", "read line; sleep 0.2")
    client = await attach(server, wire, stdin=True, stderr=True)
    await client.write(b"quiet\n")
    result = await client.result()
    assert (result.stdout, result.stderr, result.code) == (b"", b"", 0)


@pytest.mark.parametrize("wire", WIRES)
async def test_several_clients_at_once(
    server: StreamingServer, backend: Children, wire: str
) -> None:
    container = await backend.run("c", *ECHO)
    typist = await attach(server, wire, stdin=True)
    watchers = [await attach(server, other) for other in WIRES]
    await eventually(lambda: len(container.attachments) == 3)
    await typist.write(b"word\n")
    for client in (typist, *watchers):
        await client.expect(b"got word\n")
    await watchers[0].close()
    await eventually(lambda: len(container.attachments) == 2)
    await typist.write(b"again\n")
    for client in (typist, watchers[1]):
        await client.expect(b"got again\n")
        await client.close()


@pytest.mark.parametrize("wire", WIRES)
async def test_to_detach_leaves_the_container_alone(
    server: StreamingServer, backend: Children, wire: str
) -> None:
    container = await backend.run("c", *ECHO)
    for word in (b"one", b"two"):
        client = await attach(server, wire, stdin=True)
        await client.write(word + b"\n")
        await client.expect(b"got " + word + b"\n")
        await client.close()
        await eventually(lambda: not container.attachments)
    assert container.process.returncode is None


@pytest.mark.parametrize("wire", WIRES)
async def test_the_end_of_the_container(
    server: StreamingServer, backend: Children, wire: str
) -> None:
    container = await backend.run("c", *ECHO)
    client = await attach(server, wire)
    await eventually(lambda: bool(container.attachments))
    container.end_stdin()
    result = await client.result()
    assert (result.stdout, result.code) == (b"bye\n", 3)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("once", [True, False])
async def test_the_end_of_input_is_the_containers_or_only_the_clients(
    server: StreamingServer, backend: Children, wire: str, once: bool
) -> None:
    """A client that leaves by it has what its last words were answered."""
    container = await backend.run("c", *ECHO, stdin_once=once)
    client = await attach(server, wire, stdin=True)
    await client.write(b"last\n")
    await client.end_input()
    result = await client.result()
    if once:
        assert (result.stdout, result.code) == (b"got last\nbye\n", 3)
        return
    assert (result.stdout, result.code) == (b"got last\n", 0)
    await eventually(lambda: not container.attachments)
    assert container.process.returncode is None


@pytest.mark.parametrize("wire", WIRES)
async def test_a_container_that_is_not_there(server: StreamingServer, wire: str) -> None:
    result = await (await attach(server, wire)).result()
    assert result.status["message"] == 'container "c": not found'
