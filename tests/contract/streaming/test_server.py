"""What comes before and around the sessions: HTTP, tickets, timeouts, TLS."""

import asyncio
import gc
import os
import ssl
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from nodeagent.serving import descriptors
from nodeagent.streaming import server as server_module
from nodeagent.streaming import spdy
from nodeagent.streaming.backend import ExecRequest, PortForwardRequest
from nodeagent.streaming.server import Handshake, StreamingServer
from nodeagent.streaming.session import Session, Timeouts
from nodeagent.streaming.tls import TLSFiles
from nodeagent.tasks import Tasks
from tests.contract.streaming.children import Children
from tests.contract.streaming.clients import (
    COMMAND_WIRES,
    NotUpgraded,
    Result,
    Streams,
    connect_command,
    upgrade,
    upgrade_to_spdy,
    upgrade_to_websocket,
)

ECHO = ExecRequest(container_id="c", command=("echo", "x"), stdout=True)
CAT = ExecRequest(container_id="c", command=("cat",), stdin=True, stdout=True)
WIRES = ["spdy v4.channel.k8s.io", "websocket v5.channel.k8s.io"]


NEW_KEY = "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
EXTENSIONS = "subjectAltName=IP:127.0.0.1\nauthorityKeyIdentifier=keyid\n"


def openssl(command: str) -> None:
    subprocess.run(["openssl", *command.split()], check=True, capture_output=True)


class Authority:
    """A certificate authority made for one test."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self.certificate = directory / f"{name}.pem"
        self._key = directory / f"{name}.key"
        usage = "-addext keyUsage=critical,keyCertSign"
        openssl(
            f"{NEW_KEY} -x509 -subj /CN={name} {usage} -keyout {self._key} -out {self.certificate}"
        )

    def issue(self, name: str) -> tuple[Path, Path]:
        """Certificate and key for 127.0.0.1."""
        stem = self._directory / name
        certificate, key = stem.with_suffix(".pem"), stem.with_suffix(".key")
        request, extensions = stem.with_suffix(".csr"), stem.with_suffix(".ext")
        openssl(f"{NEW_KEY} -subj /CN={name} -keyout {key} -out {request}")
        extensions.write_text(EXTENSIONS)
        signer = f"-CA {self.certificate} -CAkey {self._key} -CAcreateserial"
        openssl(f"x509 -req -in {request} {signer} -extfile {extensions} -out {certificate}")
        return certificate, key


def trusting(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(authority.certificate))


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "ca")


async def speak(server: StreamingServer, text: bytes) -> bytes:
    """What the server says to these bytes, to the end of the connection."""
    host, _, port = server.url(ECHO).split("/")[2].partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(text)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


# --- tickets and requests ---


async def test_a_url_is_whole(server: StreamingServer) -> None:
    scheme, _, authority, path, token = server.url(ECHO).split("/")
    host, _, port = authority.partition(":")
    assert (scheme, host, path) == ("http:", "127.0.0.1", "exec")
    assert int(port) > 0
    assert token


@pytest.mark.parametrize(
    ("host", "authority"),
    [("0.0.0.0", "127.0.0.1:"), ("::1", "[::1]:"), ("::", "[::1]:")],
)
async def test_a_url_can_be_dialled(backend: Children, host: str, authority: str) -> None:
    async with StreamingServer(backend, Tasks(), host=host) as server:
        url = server.url(ECHO)
        assert url.startswith(f"http://{authority}")
        assert (await (await connect_command(WIRES[0], url, ECHO)).result()).stdout == b"x\n"


@pytest.mark.parametrize("wire", WIRES)
async def test_a_url_is_good_once(server: StreamingServer, wire: str) -> None:
    url = server.url(ECHO)
    await (await connect_command(wire, url, ECHO)).result()
    with pytest.raises(NotUpgraded, match="404"):
        await connect_command(wire, url, ECHO)


async def test_a_url_is_good_for_its_path(server: StreamingServer) -> None:
    with pytest.raises(NotUpgraded, match="404"):
        await upgrade_to_spdy(server.url(ECHO).replace("/exec/", "/attach/"), "v4.channel.k8s.io")


@pytest.mark.parametrize(("protocols", "status"), [((), 400), (("v9.channel.k8s.io",), 403)])
async def test_spdy_that_is_not_ours(
    server: StreamingServer, protocols: tuple[str, ...], status: int
) -> None:
    with pytest.raises(NotUpgraded) as refusal:
        await upgrade_to_spdy(server.url(ECHO), *protocols)
    assert refusal.value.status == status
    if status == 403:
        assert "X-Accepted-Stream-Protocol-Versions: v4.channel.k8s.io" in refusal.value.head


async def test_a_websocket_that_is_not_ours(server: StreamingServer) -> None:
    with pytest.raises(NotUpgraded, match="403"):
        await upgrade_to_websocket(server.url(ECHO), "v9.channel.k8s.io")


async def test_channels_without_ports(server: StreamingServer) -> None:
    with pytest.raises(NotUpgraded, match="400: port: channels carry 1 to 128 ports, not 0"):
        await upgrade_to_websocket(
            server.url(PortForwardRequest(sandbox_id="s")), "v4.channel.k8s.io"
        )


@pytest.mark.parametrize(("method", "status"), [("GET", 400), ("POST", 400), ("DELETE", 405)])
async def test_no_upgrade(server: StreamingServer, method: str, status: int) -> None:
    with pytest.raises(NotUpgraded, match=str(status)):
        await upgrade(server.url(ECHO), method, [])


@pytest.mark.parametrize(
    "noise", [b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"x" * 20000]
)
async def test_noise(server: StreamingServer, noise: bytes) -> None:
    assert (await speak(server, noise)).startswith(b"HTTP/1.1 400")


async def test_what_comes_early_is_not_lost(server: StreamingServer) -> None:
    """A client need not wait for the answer to its request."""
    client = spdy.Connection(client=True)
    for kind in ("error", "stdin", "stdout"):
        stream = client.open({"streamtype": kind})
        if kind == "stdin":
            client.send_data(stream, b"early", fin=True)
    path = server.url(CAT).split("/", 3)[3]
    head = (
        f"POST /{path} HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n"
        "X-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n"
    )
    answer = await speak(server, head.encode() + b"".join(client.data_to_send()))
    events = client.receive_data(answer.partition(b"\r\n\r\n")[2])
    output = [bytes(e.data) for e in events if isinstance(e, spdy.DataReceived) and e.stream == 5]
    assert b"".join(output) == b"early"


# --- bounds ---


async def test_a_client_that_says_nothing(server: StreamingServer) -> None:
    assert await asyncio.wait_for(speak(server, b"GET /"), 60) == b""


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("speaker", ["client", "process"])
async def test_a_session_is_idle_when_neither_side_speaks(
    backend: Children, wire: str, speaker: str
) -> None:
    script = "cat >&2" if speaker == "client" else "sleep 1; echo 1; sleep 1; echo 2; sleep 99"
    request = ExecRequest(container_id="c", command=("sh", "-c", script), stdin=True, stdout=True)
    async with StreamingServer(backend, Tasks(), timeouts=Timeouts(idle_s=2)) as server:
        client = await connect_command(wire, server.url(request), request)
        for _ in range(3):
            await asyncio.sleep(0.75)
            if speaker == "client":
                await client.write(b"x")
        started = time.monotonic()
        result = await asyncio.wait_for(client.result(), 60)
        assert 0.1 < time.monotonic() - started < 60
    assert reason_of(result) == "exec: no byte has passed for 2 s"


@pytest.mark.parametrize("wire", COMMAND_WIRES)
async def test_who_is_cut_off_by_the_end_of_the_server_is_told_so(
    backend: Children, wire: str
) -> None:
    """client-go takes a SPDY connection that ends for the end of the command, with exit code 0."""
    async with StreamingServer(backend, Tasks()) as server:
        client = await connect_command(wire, server.url(CAT), CAT)
        await client.write(b"ready")
        await client.expect(b"ready")
    assert reason_of(await client.result()) == "exec: the node agent stops"


def reason_of(result: Result) -> str:
    """Why a stream has ended; versions before 4 have a text only."""
    if isinstance(result.status, str):
        return result.status
    assert result.status["reason"] == "InternalError"
    return str(result.status["message"])


async def test_nothing_is_kept_of_a_session(server: StreamingServer) -> None:
    for wire in WIRES:
        await (await connect_command(wire, server.url(ECHO), ECHO)).result()
    await asyncio.sleep(0.05)
    gc.collect()
    assert [thing for thing in gc.get_objects() if isinstance(thing, Session | Handshake)] == []


async def test_the_number_of_sessions_is_bounded(
    server: StreamingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "MAX_SESSIONS", 1)
    client = await connect_command(WIRES[0], server.url(CAT), CAT)
    with pytest.raises(NotUpgraded, match="503: 1 sessions are open"):
        await connect_command(WIRES[0], server.url(ECHO), ECHO)
    await client.end_input()
    assert (await client.result()).code == 0
    await (await connect_command(WIRES[0], server.url(ECHO), ECHO)).result()


@asynccontextmanager
async def silent_clients(server: StreamingServer, count: int) -> AsyncIterator[Streams]:
    """Connected and silent, in the order that the server accepts them."""
    host, _, port = server.url(ECHO).split("/")[2].partition(":")
    clients = [await asyncio.open_connection(host, int(port)) for _ in range(count)]
    yield clients[0]
    for _, writer in clients:
        writer.transport.abort()


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "tls"])
async def test_silent_clients_make_room(
    backend: Children,
    authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
    wire: str,
    encrypted: bool,
) -> None:
    """Those that have a session keep it, and count for themselves; those that say nothing go, the oldest first."""
    monkeypatch.setattr(server_module, "MAX_HANDSHAKES", 4)
    files, context = None, None
    if encrypted:
        certificate, key = authority.issue("server")
        files, context = TLSFiles(certificate=str(certificate), key=str(key)), trusting(authority)
    async with StreamingServer(
        backend, Tasks(), tls=files, timeouts=Timeouts(head_s=1000)
    ) as server:
        sessions = [await connect_command(wire, server.url(CAT), CAT, context) for _ in range(8)]
        async with silent_clients(server, 20) as oldest:
            client = await connect_command(wire, server.url(ECHO), ECHO, context)
            assert (await client.result()).stdout == b"x\n"
            with suppress(ConnectionResetError):
                assert await oldest[0].read() == b""
            for session in sessions:
                await session.write_all(b"still here")
                assert (await session.result()).stdout == b"still here"


async def test_a_tls_handshake_that_does_not_end(backend: Children, authority: Authority) -> None:
    certificate, key = authority.issue("server")
    files = TLSFiles(certificate=str(certificate), key=str(key))
    async with StreamingServer(
        backend, Tasks(), tls=files, timeouts=Timeouts(head_s=0.1)
    ) as server:
        assert await speak(server, b"\x16\x03\x01") == b""


async def test_a_request_that_comes_in_small_pieces(server: StreamingServer) -> None:
    """The time is for the whole request, not for the next byte of it."""
    host, _, port = server.url(ECHO).split("/")[2].partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET / HTTP/1.1\r\n")
    with suppress(ConnectionError):
        while not reader.at_eof():
            writer.write(b"X: y\r\n")
            await writer.drain()
            await asyncio.sleep(0.05)
        assert await reader.read() == b""
    writer.transport.abort()


async def test_a_head_request(server: StreamingServer, caplog: pytest.LogCaptureFixture) -> None:
    answer = await speak(server, b"HEAD /exec/x HTTP/1.1\r\nHost: h\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 405")
    assert answer.endswith(b"\r\n\r\n")
    assert caplog.text == ""


async def test_descriptors_are_kept_back(
    server: StreamingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descriptors, "is_reserved", lambda _: True)
    with suppress(ConnectionResetError):
        assert await speak(server, b"") == b""


async def test_a_backend_with_a_bug_is_told_as_such(
    server: StreamingServer,
    backend: Children,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(backend, "exec", fail)
    result = await (await connect_command(WIRES[0], server.url(ECHO), ECHO)).result()
    assert result.status["message"] == "internal error of the node agent"
    assert "ZeroDivisionError" in caplog.text


# --- TLS ---


@pytest.mark.parametrize("wire", WIRES)
async def test_tls(backend: Children, authority: Authority, wire: str) -> None:
    certificate, key = authority.issue("server")
    files = TLSFiles(certificate=str(certificate), key=str(key))
    async with StreamingServer(backend, Tasks(), tls=files) as server:
        url = server.url(CAT)
        assert url.startswith("https://127.0.0.1:")
        client = await connect_command(wire, url, CAT, trusting(authority))
        data = os.urandom(4 << 20)
        _, result = await asyncio.gather(client.write_all(data), client.result())
        assert (result.stdout == data, result.code) == (True, 0)


async def test_a_client_certificate_may_be_needed(
    backend: Children, authority: Authority, tmp_path: Path
) -> None:
    certificate, key = authority.issue("server")
    clients = Authority(tmp_path, "clients")
    files = TLSFiles(certificate=str(certificate), key=str(key), client_ca=str(clients.certificate))
    async with StreamingServer(backend, Tasks(), tls=files) as server:
        context = trusting(authority)
        with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
            await connect_command(WIRES[0], server.url(ECHO), ECHO, context)
        context.load_cert_chain(*clients.issue("kubelet"))
        client = await connect_command(WIRES[0], server.url(ECHO), ECHO, context)
        assert (await client.result()).stdout == b"x\n"


async def test_certificates_are_read_again(
    backend: Children, authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    certificate, key = authority.issue("server")
    files = TLSFiles(certificate=str(certificate), key=str(key))
    other = Authority(tmp_path, "other")
    async with StreamingServer(
        backend, Tasks(), tls=files, timeouts=Timeouts(tls_check_s=0.05)
    ) as server:
        old = await connect_command(WIRES[0], server.url(CAT), CAT, trusting(authority))
        certificate.write_text("junk")
        await asyncio.sleep(0.2)
        await (
            await connect_command(WIRES[0], server.url(ECHO), ECHO, trusting(authority))
        ).result()
        assert "keeps the old ones" in caplog.text
        new_certificate, new_key = other.issue("renewed")
        new_key.replace(key)
        new_certificate.replace(certificate)
        await asyncio.sleep(0.3)
        with pytest.raises(ssl.SSLCertVerificationError):
            await connect_command(WIRES[0], server.url(ECHO), ECHO, trusting(authority))
        new = await connect_command(WIRES[0], server.url(ECHO), ECHO, trusting(other))
        assert (await new.result()).stdout == b"x\n"
        await old.write_all(b"still here")
        assert (await old.result()).stdout == b"still here"


async def test_a_missing_file_is_named(backend: Children, tmp_path: Path) -> None:
    files = TLSFiles(certificate=str(tmp_path / "none.pem"), key=str(tmp_path / "none.key"))
    with pytest.raises(FileNotFoundError, match=r"none\.pem"):
        async with StreamingServer(backend, Tasks(), tls=files):
            pass


async def test_an_address_that_is_taken(server: StreamingServer, backend: Children) -> None:
    port = int(server.url(ECHO).split("/")[2].rpartition(":")[2])
    with pytest.raises(OSError, match="Address already in use"):
        async with StreamingServer(backend, Tasks(), port=port):
            pass
