"""The Prometheus endpoint: read by Prometheus' own parser."""

import asyncio
from contextlib import suppress

import aiohttp
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from nodeagent.metrics import server as server_module
from nodeagent.metrics.server import MetricsServer
from nodeagent.requests import ContainerConfig, SandboxConfig
from tests.unit.cri.node import FakeNode
from tests.unit.metrics.test_pod_metrics import running_pod


async def scraped(server: MetricsServer) -> dict[str, Metric]:
    page = (await server.render()).decode()
    families = list(text_string_to_metric_families(page))
    names = [family.name for family in families]
    assert len(names) == len(set(names)), "a family is there twice"
    assert all(family.documentation for family in families)
    return {family.name: family for family in families}


def value(families: dict[str, Metric], name: str, **labels: str) -> float:
    base = name.removesuffix("_total").removesuffix("_count").removesuffix("_sum")
    found = [
        sample.value
        for sample in families[base].samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert len(found) == 1, (name, labels, found)
    return float(found[0])


async def test_containers_with_their_labels() -> None:
    async with MetricsServer.open((await running_pod()).node, "") as server:
        found = await scraped(server)
    labels = {"namespace": "prod", "pod": "web", "container": "main"}
    assert value(found, "container_cpu_usage_seconds_total", **labels) == 2.5
    assert value(found, "container_memory_working_set_bytes", **labels) == 800
    assert value(found, "container_threads", **labels) == 6
    assert value(found, "container_fs_reads_bytes_total", **labels) == 31
    assert value(found, "container_pressure_io_stalled_seconds_total", **labels) == 1.5
    network = {"namespace": "prod", "pod": "web", "interface": "eth0"}
    assert value(found, "container_network_receive_bytes_total", **network) == 1


async def test_what_became_of_the_output_of_containers() -> None:
    async with MetricsServer.open((await running_pod()).node, "") as server:
        found = await scraped(server)
    labels = {"namespace": "prod", "pod": "web", "container": "main"}
    assert value(found, "nodeagent_container_log_dropped_lines_total", **labels) == 3
    assert value(found, "nodeagent_container_log_held_back_seconds_total", **labels) == 1.5


async def test_the_node_and_the_agent() -> None:
    async with MetricsServer.open((await running_pod()).node, "") as server:
        found = await scraped(server)
    assert value(found, "nodeagent_pods", state="ready") == 1
    assert value(found, "nodeagent_pods", state="notready") == 0
    assert value(found, "nodeagent_containers", state="running") == 1
    assert value(found, "nodeagent_containers", state="exited") == 0
    assert value(found, "nodeagent_warm_slots") == 3
    assert value(found, "nodeagent_build_info", version="0.1.0") == 1
    assert value(found, "process_open_fds") > 0


async def test_calls_are_counted() -> None:
    async with MetricsServer.open(FakeNode().node, "") as server:
        server.observe("Version", "OK", 0.002)
        server.observe("Version", "OK", 0.004)
        server.observe("PullImage", "OK", 90.0)
        server.observe("PullImage", "UNKNOWN", 1.0)
        found = await scraped(server)
    assert value(found, "nodeagent_rpc_duration_seconds_count", method="Version") == 2
    assert value(found, "nodeagent_rpc_duration_seconds_sum", method="Version") == 0.006
    assert value(found, "nodeagent_rpc_errors_total", method="PullImage", code="UNKNOWN") == 1
    assert value(found, "nodeagent_image_pull_duration_seconds_sum") == 90


async def test_images() -> None:
    node = FakeNode()
    await node.images.pull("a", None)
    node.images.counters.pulls["failure"] += 2
    node.images.counters.pulls_in_progress = 1
    node.images.counters.fetched_bytes = 1234
    node.images.counters.layers_skipped = 5
    async with MetricsServer.open(node.node, "") as server:
        found = await scraped(server)
    assert value(found, "nodeagent_images") == 1
    assert value(found, "nodeagent_images_bytes") == 1234
    assert value(found, "nodeagent_image_pulls_total", result="failure") == 2
    assert value(found, "nodeagent_image_pulls_total", result="success") == 0
    assert value(found, "nodeagent_image_pulls_in_progress") == 1
    assert value(found, "nodeagent_image_bytes_total", how="fetched") == 1234
    assert value(found, "nodeagent_image_layers_total", how="skipped") == 5


async def test_pods_that_do_not_answer() -> None:
    node = FakeNode()
    node.sandboxes.not_answering = {"a": "process 7 does not answer: it is stopped"}
    async with MetricsServer.open(node.node, "") as server:
        assert value(await scraped(server), "nodeagent_pods_not_answering") == 1


async def test_leaks_by_kind() -> None:
    async with MetricsServer.open(FakeNode().node, "") as server:
        found = await scraped(server)
    assert [value(found, "nodeagent_leaks_total", kind=kind) for kind in ("pod", "hold")] == [0, 2]


async def test_failures_of_background_tasks_by_task() -> None:
    node = FakeNode()
    node.tasks.failures.expect("warm slots")
    node.tasks.failures.note("trash", OSError(5, "Input/output error"))
    async with MetricsServer.open(node.node, "") as server:
        found = await scraped(server)
    name = "nodeagent_background_task_failures_total"
    assert [value(found, name, task=task) for task in ("trash", "warm slots")] == [1, 0]


async def test_a_label_of_any_kind_is_escaped() -> None:
    node = FakeNode()
    name = 'a"\\\n}é'
    pod = await node.sandboxes.run(SandboxConfig(name=name, uid="u", namespace="n"), "")
    made = await node.containers.create(pod, ContainerConfig(name="c", image="i"))
    await node.containers.start(made)
    async with MetricsServer.open(node.node, "") as server:
        found = await scraped(server)
    assert value(found, "container_threads", pod=name) == 6


async def test_over_http() -> None:
    async with MetricsServer.open((await running_pod()).node, "127.0.0.1:0") as server:
        assert server.address is not None
        url = f"http://{server.address[0]}:{server.address[1]}"
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{url}/metrics") as reply:
                assert reply.status == 200
                assert reply.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
                assert "container_threads" in await reply.text()
            for path, status in (("/", 404), ("/metrics/x", 404)):
                async with session.get(url + path) as reply:
                    assert reply.status == status
            async with session.post(f"{url}/metrics") as reply:
                assert reply.status == 405
            async with session.head(f"{url}/metrics") as reply:
                assert reply.status == 200
                assert int(reply.headers["Content-Length"]) > 1000
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*server.address)


async def test_a_large_scrape_leaves_the_loop_free() -> None:
    node = FakeNode()
    pod = await node.sandboxes.run(SandboxConfig(name="p", uid="u", namespace="n"), "")
    for number in range(200):
        config = ContainerConfig(name=f"c{number}", image="i")
        await node.containers.start(await node.containers.create(pod, config))
    async with MetricsServer.open(node.node, "") as server:
        scrape = asyncio.create_task(server.render())
        turns = 0
        while not scrape.done():
            await asyncio.sleep(0)
            turns += 1
    assert len(scrape.result()) > 100_000
    assert turns > 100


# --- bounds ---

GET = b"GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n"

Client = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def connected(server: MetricsServer, text: bytes = b"") -> Client:
    """A client that has said this, and reads nothing."""
    assert server.address is not None
    reader, writer = await asyncio.open_connection(*server.address, limit=1)
    writer.write(text)
    return reader, writer


async def answer(client: Client) -> bytes:
    """All that the server says until it closes."""
    reader, writer = client
    received = b""
    with suppress(ConnectionResetError):
        while data := await reader.read(1 << 16):
            received += data
    writer.transport.abort()
    return received


async def test_silent_clients_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HEAD_SECONDS", 1000.0)
    async with MetricsServer.open(FakeNode().node, "127.0.0.1:0") as server:
        silent = [
            await connected(server, b"GET /met") for _ in range(server_module.MAX_CONNECTIONS + 1)
        ]
        page = await answer(await connected(server, GET))
        assert page.startswith(b"HTTP/1.1 200")
        assert await answer(silent[0]) == b""
        for _, writer in silent:
            writer.transport.abort()


async def test_a_request_has_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HEAD_SECONDS", 0.05)
    async with MetricsServer.open(FakeNode().node, "127.0.0.1:0") as server:
        assert await answer(await connected(server, GET[:-2])) == b""


async def test_an_answer_that_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds its place for a while, not to the end."""
    monkeypatch.setattr(server_module, "MAX_CONNECTIONS", 1)
    monkeypatch.setattr(server_module, "ANSWER_SECONDS", 0.5)
    async with MetricsServer.open(FakeNode().node, "127.0.0.1:0") as server:
        pages = [bytes(64 << 20), b"small"]

        async def render() -> bytes:
            return pages.pop(0)

        monkeypatch.setattr(server, "render", render)
        _, writer = await connected(server, GET)
        assert (await answer(await connected(server, GET))).endswith(b"small")
        assert pages == []
        writer.transport.abort()


async def test_one_request_a_connection() -> None:
    async with MetricsServer.open(FakeNode().node, "127.0.0.1:0") as server:
        text = await answer(await connected(server, GET * 3))
        assert text.count(b"HTTP/1.1 ") <= 1  # what the client sent in vain may cost it the answer
        assert (await answer(await connected(server, GET))).count(b"HTTP/1.1 200") == 1


@pytest.mark.parametrize(
    "text",
    [
        b"\x16\x03\x01\x02\x00\r\n\r\n",
        GET[:-2] + b"X: " + b"x" * 20_000,
        b"GET /metrics HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\nx",
        b"",
    ],
    ids=["another protocol", "endless headers", "a body", "the end"],
)
async def test_no_request(text: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async with MetricsServer.open(FakeNode().node, "127.0.0.1:0") as server:
        client = await connected(server, text)
        client[1].write_eof()
        assert (await answer(client))[:12] in (b"", b"HTTP/1.1 400")
        assert b"200 " in await answer(await connected(server, GET))
    assert caplog.text == ""


async def test_who_waits_at_the_same_time_shares_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    async with MetricsServer.open(FakeNode().node, "127.0.0.1:0") as server:
        rendered = 0
        go_on = asyncio.Event()

        async def render() -> bytes:
            nonlocal rendered
            rendered += 1
            page = b"page %d" % rendered
            await go_on.wait()
            return page

        monkeypatch.setattr(server, "render", render)
        first = asyncio.create_task(server._page())
        await asyncio.sleep(0)
        others = [asyncio.create_task(server._page()) for _ in range(10)]
        await asyncio.sleep(0)
        go_on.set()
        assert await first == b"page 1"
        assert set(await asyncio.gather(*others)) == {b"page 2"}
        assert await server._page() == b"page 3"
