"""Places, time and descriptors of connections that nobody asked for."""

import asyncio
import os
import resource
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from nodeagent.serving import descriptors, listener
from nodeagent.serving.listener import Listener, Place
from nodeagent.tasks import Tasks

PLACES = 3
FOREVER_S = 1000.0

Client = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[[], Awaitable[Client]]


async def echo_line(connection: socket.socket, place: Place) -> None:
    """The first line keeps the place and comes back, "fail" excepted; then the connection waits for its end."""
    reader, writer = await asyncio.open_connection(sock=connection)
    try:
        line = await reader.readline()
        if line == b"fail\n":
            raise ZeroDivisionError
        place.keep(0.0 if line == b"late\n" else None)
        writer.write(line)
        await reader.read()
    finally:
        writer.transport.abort()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "PROTECTED_S", 0.0)
    monkeypatch.setattr(listener, "PAUSE_S", 0.001)


@asynccontextmanager
async def serving(head_s: float = FOREVER_S) -> AsyncIterator[Connect]:
    """A server with few places; the clients that are left are closed at the end."""
    listening = listener.bind("127.0.0.1", 0)
    address = listening.getsockname()
    server = Listener(
        listening, echo_line, name="test", places=PLACES, head_s=head_s, tasks=Tasks()
    )
    clients: list[Client] = []

    async def connect() -> Client:
        clients.append(await asyncio.open_connection(*address))
        return clients[-1]

    async with server.open():
        yield connect
        for _, writer in clients:
            writer.transport.abort()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*address)


async def said(client: Client, text: bytes) -> bytes:
    """What the server answers; empty where it closes."""
    reader, writer = client
    writer.write(text + b"\n")
    try:
        return (await reader.readline()).strip()
    except ConnectionResetError:
        return b""


async def is_closed(client: Client) -> bool:
    try:
        return await client[0].read() == b""
    except ConnectionResetError:
        return True


async def test_the_oldest_silent_client_makes_room() -> None:
    async with serving() as connect:
        silent = [await connect() for _ in range(10 * PLACES)]
        for number, client in enumerate(silent[:-PLACES]):
            assert await is_closed(client), number
        assert await said(silent[-1], b"hello") == b"hello"
        assert await said(await connect(), b"too") == b"too"


async def test_who_has_spoken_is_left_alone() -> None:
    async with serving() as connect:
        kept = [await connect() for _ in range(PLACES - 1)]
        for client in kept:
            assert await said(client, b"first") == b"first"
        silent = [await connect() for _ in range(10)]
        for client in silent[:-1]:
            assert await is_closed(client)
        assert await said(silent[-1], b"last") == b"last"
        waiting = await connect()
        assert not any(reader.at_eof() for reader, _ in kept)
        kept[0][1].close()
        assert await said(waiting, b"at last") == b"at last"


async def test_a_new_client_has_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes next waits for it, and for no longer than it takes until a place is free."""
    monkeypatch.setattr(listener, "PROTECTED_S", FOREVER_S)
    async with serving() as connect:
        protected = [await connect() for _ in range(PLACES)]
        waiting = [await connect() for _ in range(PLACES)]
        for number, client in enumerate(protected):
            assert await said(client, b"%d" % number) == b"%d" % number
        for (_, writer), client in zip(protected, waiting, strict=True):
            writer.close()
            assert await said(client, b"next") == b"next"


async def test_a_silent_client_has_limited_time() -> None:
    async with serving(head_s=0.01) as connect:
        assert await is_closed(await connect())


async def test_a_kept_place_may_have_limited_time() -> None:
    async with serving() as connect:
        client = await connect()
        await said(client, b"late")
        assert await is_closed(client)


async def test_a_server_that_fails_serves_the_next(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as connect:
        for _ in range(PLACES + 1):
            assert await said(await connect(), b"fail") == b""
        assert await said(await connect(), b"hello") == b"hello"
    assert caplog.text.count("test: a connection failed") == PLACES + 1
    assert "ZeroDivisionError" in caplog.text


async def test_leaving_closes_everything() -> None:
    before = os.listdir("/proc/self/fd")
    async with serving() as connect:
        await said(await connect(), b"kept")
        for _ in range(PLACES + 1):
            await connect()
    await asyncio.sleep(0)
    assert len(os.listdir("/proc/self/fd")) == len(before)


# --- descriptors ---


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Every number below the soft limit is taken."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        last = os.open("/dev/null", os.O_RDONLY)
        stack.callback(os.close, last)
        resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1, limits[1]))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        yield


async def test_without_descriptors_clients_wait(caplog: pytest.LogCaptureFixture) -> None:
    attempts = 0

    async with serving() as connect:
        with socket.socket() as early:
            early.setblocking(False)
            client = (
                await connect()
            )  # the kernel accepts it; the server only hears of it when its loop runs
            assert await said(client, b"before") == b"before"
            with no_descriptors():
                early.connect_ex(client[1].get_extra_info("peername"))
                while attempts < 50:
                    attempts += 1
                    await asyncio.sleep(0.002)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(early, b"after\n")
            assert await loop.sock_recv(early, 100) == b"after\n"
    assert [record.getMessage() for record in caplog.records] == [
        "test: connections are refused: Too many open files"
    ]


async def test_the_last_descriptors_are_not_for_clients(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reserved = True
    monkeypatch.setattr(descriptors, "is_reserved", lambda _: reserved)
    async with serving() as connect:
        for _ in range(10):
            assert await is_closed(await connect())
        reserved = False
        assert await said(await connect(), b"hello") == b"hello"
    assert len(caplog.records) == 1
    assert "reserved for the CRI" in caplog.text


# --- sockets ---


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_an_address_that_is_taken(host: str) -> None:
    with (
        listener.bind(host, 0) as listening,
        pytest.raises(OSError, match="Address already in use"),
    ):
        listener.bind(host, listening.getsockname()[1])


def test_a_unix_socket_is_its_owners(tmp_path: Path) -> None:
    path = tmp_path / "s"
    umask = os.umask(0)
    try:
        for _ in range(2):
            with listener.bind_unix(path):
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(umask)
