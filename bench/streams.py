"""Times exec sessions, and the throughput of their streams and of port-forward, with one client for every runtime."""

import statistics
import time

from bench.cri import Client
from nodeagent.streaming.backend import ExecRequest
from nodeagent.streaming.remotecommand import Channel
from tests.contract.streaming.clients import (
    SpdyForward,
    connect_command,
    upgrade_to_spdy,
)

WIRE = "spdy v4.channel.k8s.io"
FORWARD = "portforward.k8s.io"
SESSIONS = 25
MESSAGE_BYTES = 32 << 10
STDOUT_BYTES = 256 << 20
STDIN_BYTES = 64 << 20
FORWARD_BYTES = 128 << 20
PORT = 9000


async def measure(client: Client) -> dict[str, float]:
    """By label: milliseconds, or MB/s."""
    pod_id, container_id = client.start_pod("streams")
    try:
        starts = [await _session_start(client, container_id) for _ in range(SESSIONS)]
        return {
            "exec session to first output, p50 ms": statistics.median(starts),
            "stdout, MB/s": await _stdout(client, container_id),
            "stdin, MB/s": await _stdin(client, container_id),
            "port-forward, MB/s": await _forward(client, pod_id, container_id),
        }
    finally:
        client.remove_pod(pod_id, container_id)


async def _session_start(client: Client, container_id: str) -> float:
    begin = time.perf_counter()
    request = _request(container_id, "echo", "ready")
    session = await connect_command(WIRE, client.exec_url(container_id, "echo", "ready"), request)
    await session.expect(b"ready")
    elapsed = time.perf_counter() - begin
    await session.result()
    return elapsed * 1000


async def _stdout(client: Client, container_id: str) -> float:
    command = ("head", "-c", str(STDOUT_BYTES), "/dev/zero")
    url = client.exec_url(container_id, *command)
    begin = time.perf_counter()
    session = await connect_command(WIRE, url, _request(container_id, *command))
    received = 0
    while await session.more():
        received += len(session.received[Channel.STDOUT])
        session.received[Channel.STDOUT].clear()
    await session.close()
    return _rate(received, STDOUT_BYTES, begin)


async def _stdin(client: Client, container_id: str) -> float:
    command = ("sh", "-c", "cat >/dev/null")
    url = client.exec_url(container_id, *command, stdin=True)
    begin = time.perf_counter()
    session = await connect_command(WIRE, url, _request(container_id, *command, stdin=True))
    await session.write_all(bytes(STDIN_BYTES), MESSAGE_BYTES)
    await session.result()
    return _rate(STDIN_BYTES, STDIN_BYTES, begin)


async def _forward(client: Client, pod_id: str, container_id: str) -> float:
    client.run_behind(container_id, f"nc -l -p {PORT} -e head -c {FORWARD_BYTES} /dev/zero")
    session = SpdyForward(await upgrade_to_spdy(client.forward_url(pod_id), FORWARD), tunnel=False)
    await session.flush()
    begin = time.perf_counter()
    number = session.connect(PORT)
    await session.flush()
    connection = session.connections[number]
    received = 0
    while received < FORWARD_BYTES and await session.more():
        received += len(connection.data)
        connection.data.clear()
    rate = _rate(received, FORWARD_BYTES, begin)
    await session.close()
    return rate


def _request(container_id: str, *command: str, stdin: bool = False) -> ExecRequest:
    return ExecRequest(container_id=container_id, command=command, stdin=stdin, stdout=True)


def _rate(received: int, wanted: int, begin: float) -> float:
    assert received == wanted, f"{received} of {wanted} bytes"
    return received / 1e6 / (time.perf_counter() - begin)
