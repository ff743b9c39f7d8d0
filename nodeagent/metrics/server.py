"""``GET /metrics`` for Prometheus.

A scrape reads the node on the loop, which owns it, and makes the text in a thread. One is made at a time: a second
scraper waits, and whoever gives up costs nothing more.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Self

from aiohttp import web
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from nodeagent.config import split_address
from nodeagent.lifecycle.node import Node
from nodeagent.metrics.collectors import LogCollector, NodeCollector, RpcMetrics, UsageCollector

CLOSE_SECONDS = 1.0
MAX_HEADER_BYTES = 8192


class MetricsServer:
    """`observe` is called at the end of each RPC, also where nothing is served. address: where it listens."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._agent = CollectorRegistry()
        ProcessCollector(registry=self._agent)
        self._lock = asyncio.Lock()
        self.observe = RpcMetrics(self._agent).observe
        self.address: tuple[str, int] | None = None

    @classmethod
    @asynccontextmanager
    async def open(cls, node: Node, address: str) -> AsyncIterator[Self]:
        """Serve on ``ADDRESS:PORT``; nothing without one. Port 0 is any."""
        server = cls(node)
        async with AsyncExitStack() as stack:
            if address:
                await server._listen(*split_address(address), stack)
            yield server

    async def _listen(self, host: str, port: int, stack: AsyncExitStack) -> None:
        application = web.Application(client_max_size=1)
        application.router.add_get("/metrics", self._scrape)
        runner = web.AppRunner(
            application,
            access_log=None,
            shutdown_timeout=CLOSE_SECONDS,
            max_field_size=MAX_HEADER_BYTES,
        )
        stack.push_async_callback(runner.cleanup)
        await runner.setup()
        await web.TCPSite(runner, host, port).start()
        name = runner.addresses[0]
        self.address = (name[0], name[1])

    async def _scrape(self, request: web.Request) -> web.Response:
        async with self._lock:
            body = await self.render()
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    async def render(self) -> bytes:
        """The whole page."""
        now = CollectorRegistry()
        now.register(NodeCollector(self._node))
        now.register(UsageCollector(await self._node.stats.sandboxes()))
        now.register(LogCollector(await self._node.stats.logs()))
        return await asyncio.to_thread(
            lambda: b"".join(generate_latest(registry) for registry in (self._agent, now))
        )
