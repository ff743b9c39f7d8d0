"""One suite for port-forward over SPDY, over its tunnel, and over the legacy channels."""

import asyncio
import random
from functools import partial

import pytest

from nodeagent.serving import descriptors
from nodeagent.streaming.backend import PortForwardRequest
from nodeagent.streaming.server import StreamingServer
from tests.contract.streaming import targets
from tests.contract.streaming.children import Children
from tests.contract.streaming.clients import (
    FORWARD_WIRES,
    ForwardClient,
    SpdyForward,
    connect_forward,
    greeting,
)
from tests.contract.streaming.targets import listening
from tests.contract.streaming.waiting import eventually, until_blocked

SPDY_WIRES = ["spdy", "tunnel"]


async def forward(server: StreamingServer, wire: str, *ports: int) -> ForwardClient:
    request = PortForwardRequest(sandbox_id="s", ports=ports)
    return await connect_forward(wire, server.url(request))


async def forward_spdy(server: StreamingServer, wire: str) -> SpdyForward:
    client = await forward(server, wire)
    assert isinstance(client, SpdyForward)
    return client


@pytest.mark.parametrize("wire", FORWARD_WIRES)
async def test_a_connection(server: StreamingServer, wire: str) -> None:
    async with listening(targets.echo) as port:
        client = await forward(server, wire, port)
        connection = client.connect(port)
        await client.write(connection, b"hello")
        prefix = greeting(port) if wire == "channels" else b""
        await client.expect(connection, prefix + b"hello")
        await client.write(connection, b"again")
        await client.expect(connection, b"again")
        await client.close()


@pytest.mark.parametrize("wire", FORWARD_WIRES)
async def test_many_bytes_and_fifty_connections(server: StreamingServer, wire: str) -> None:
    source = random.Random(2)
    async with listening(targets.echo) as port:
        client = await forward(server, wire, *[port] * 50)
        prefix = greeting(port) if wire == "channels" else b""
        sent = {client.connect(port): source.randbytes(200_000) for _ in range(50)}

        async def write_all() -> None:
            for start in range(0, 200_000, 20_000):
                for connection, data in sent.items():
                    await client.write(connection, data[start : start + 20_000])

        async def read_all() -> None:
            for connection, data in sent.items():
                await client.expect(connection, prefix + data)

        await asyncio.gather(write_all(), read_all())
        await client.close()


@pytest.mark.parametrize("wire", SPDY_WIRES)
async def test_the_answer_to_a_half_close_may_take_its_time(
    server: StreamingServer, wire: str
) -> None:
    async with listening(targets.answer_late) as port:
        client = await forward_spdy(server, wire)
        connection = client.connect(port)
        await client.write(connection, b"question")
        await client.end(connection)
        state = client.connections[connection]
        await client.until(lambda: state.over)
        assert state.data == b"answer to question"
        assert state.error == b""
        assert state.ended
        assert not state.reset
        await client.close()


@pytest.mark.parametrize("wire", SPDY_WIRES)
async def test_the_targets_end_is_not_the_clients(server: StreamingServer, wire: str) -> None:
    received: list[bytes] = []

    async def speak_then_listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"first")
        writer.write_eof()
        received.append(await reader.read())

    async with listening(speak_then_listen) as port:
        client = await forward_spdy(server, wire)
        connection = client.connect(port)
        state = client.connections[connection]
        await client.flush()
        await client.until(lambda: state.ended)
        assert not state.over
        await client.write(connection, b"still here")
        await client.end(connection)
        await client.until(lambda: state.over)
        await eventually(lambda: received == [b"still here"])
        await client.close()


@pytest.mark.parametrize("wire", SPDY_WIRES)
async def test_a_reset_ends_its_own_connection_and_says_nothing(
    server: StreamingServer, wire: str
) -> None:
    async with listening(targets.reset) as bad, listening(targets.echo) as good:
        client = await forward_spdy(server, wire)
        healthy, broken = client.connect(good), client.connect(bad)
        await client.write(broken, b"x")
        await client.until(lambda: client.connections[broken].over)
        assert client.connections[broken].error == b""
        await client.write(healthy, b"alive")
        await client.expect(healthy, b"alive")
        await client.close()


@pytest.mark.parametrize("wire", SPDY_WIRES)
async def test_writing_to_a_closed_target_ends_its_own_connection(
    server: StreamingServer, wire: str
) -> None:
    async with listening(targets.speak_and_close) as port, listening(targets.echo) as good:
        client = await forward_spdy(server, wire)
        closed, healthy = client.connect(port), client.connect(good)
        state = client.connections[closed]
        await client.flush()
        await client.until(lambda: state.ended)
        while not state.over:
            await client.write(closed, b"x")
            await client.write(healthy, b"y")
            await client.expect(healthy, b"y")
        assert state.data == b"go away"
        assert state.error == b""
        await client.close()


@pytest.mark.parametrize("wire", FORWARD_WIRES)
async def test_a_failed_dial_is_told(server: StreamingServer, wire: str) -> None:
    port = targets.free_port()
    client = await forward(server, wire, port)
    connection = client.connect(port)
    await client.flush()
    state = client.connections[connection]
    await client.until(lambda: b"refused" in state.error or b"Connect call failed" in state.error)
    assert f"port {port}: ".encode() in state.error
    await client.close()


@pytest.mark.parametrize("wire", FORWARD_WIRES)
async def test_the_last_descriptors_are_not_for_connections(
    server: StreamingServer, wire: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with listening(targets.echo) as port:
        client = await forward(server, wire, port)
        monkeypatch.setattr(descriptors, "is_reserved", lambda _: True)
        connection = client.connect(port)
        await client.flush()
        state = client.connections[connection]
        await client.until(lambda: b"no file descriptors left" in state.error)
        await client.close()


@pytest.mark.parametrize("wire", SPDY_WIRES)
async def test_a_failed_dial_is_not_the_others(server: StreamingServer, wire: str) -> None:
    async with listening(targets.echo) as port:
        client = await forward_spdy(server, wire)
        refused, healthy = client.connect(targets.free_port()), client.connect(port)
        await client.flush()
        await client.until(lambda: client.connections[refused].over)
        assert client.connections[refused].reset
        await client.write(healthy, b"alive")
        await client.expect(healthy, b"alive")
        await client.close()


@pytest.mark.parametrize("wire", SPDY_WIRES)
async def test_a_client_aborts_a_connection(server: StreamingServer, wire: str) -> None:
    ended = asyncio.Event()

    async def greet_and_listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hi")
        await reader.read()
        ended.set()

    async with listening(greet_and_listen) as port:
        client = await forward_spdy(server, wire)
        connection, other = client.connect(port), client.connect(port)
        await client.flush()
        await client.expect(connection, b"hi")
        await client.abort(connection)
        await client.until(lambda: client.connections[connection].over)
        await asyncio.wait_for(ended.wait(), 60)
        assert not client.connections[other].over
        await client.close()


async def test_aborted_before_it_was_dialled(server: StreamingServer) -> None:
    async with listening(targets.echo) as port:
        client = await forward_spdy(server, "spdy")
        connection = client.connect(port)
        await client.abort(connection)
        await client.until(lambda: client.connections[connection].over)
        healthy = client.connect(port)
        await client.write(healthy, b"alive")
        await client.expect(healthy, b"alive")
        await client.close()


@pytest.mark.parametrize("wire", FORWARD_WIRES)
async def test_a_client_that_leaves_ends_its_connections(
    server: StreamingServer, wire: str
) -> None:
    ended = asyncio.Event()

    async def listen(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        await reader.read()
        ended.set()

    async with listening(listen) as port:
        client = await forward(server, wire, port)
        await client.write(client.connect(port), b"x")
        await asyncio.sleep(0.1)
        await client.close()
        await asyncio.wait_for(ended.wait(), 60)


@pytest.mark.parametrize("wire", SPDY_WIRES)
async def test_a_slow_target_slows_the_client(server: StreamingServer, wire: str) -> None:
    release = asyncio.Event()
    received = 0

    async def wait_then_count(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        nonlocal received
        await release.wait()
        while data := await reader.read(1 << 20):
            received += len(data)

    async with listening(wait_then_count) as port:
        client = await forward_spdy(server, wire)
        connection = client.connect(port)
        written = await until_blocked(partial(client.write, connection))
        assert written < 100_000_000
        release.set()
        await client.end(connection)
        await client.until(lambda: client.connections[connection].over)
        assert received >= written
        await client.close()


async def test_a_stream_that_stays_alone_is_dropped(server: StreamingServer) -> None:
    client = await forward_spdy(server, "spdy")
    lonely = client.spdy.open({"streamtype": "error", "port": "80", "requestid": "x"})
    await client.flush()
    with pytest.raises(AssertionError, match=f"StreamReset\\(stream={lonely}"):
        await asyncio.wait_for(client.until(lambda: False), 60)
    await client.close()


async def test_the_session_of_channels_ends_with_the_last(server: StreamingServer) -> None:
    async with listening(targets.speak_and_close) as port:
        client = await forward(server, "channels", port, port)
        numbers = [client.connect(port), client.connect(port)]
        while await client.more():
            pass
        for number in numbers:
            state = client.connections[number]
            assert state.data == greeting(port) + b"go away"
            assert state.error == greeting(port)
        await client.close()


async def test_ports_are_dialled_as_asked(server: StreamingServer, backend: Children) -> None:
    ports = [targets.free_port(), targets.free_port()]
    client = await forward(server, "spdy")
    for port in ports:
        client.connect(port)
    await client.flush()
    await client.until(lambda: all(state.over for state in client.connections.values()))
    assert backend.dials == ports
    await client.close()
