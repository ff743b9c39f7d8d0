"""``GET /metrics`` for Prometheus.

A scrape reads the node on the loop, which owns it, and renders the text in a thread. One page is rendered at a time,
for all scrapers that wait for it. A connection is closed after its answer, or when the client does not read it in time.
"""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Self

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from nodeagent.config import split_address
from nodeagent.lifecycle.node import Node
from nodeagent.metrics.collectors import LogCollector, NodeCollector, RpcMetrics, UsageCollector
from nodeagent.serving import http1, listener
from nodeagent.serving.listener import Listener, Place

MAX_CONNECTIONS = 32
HEAD_SECONDS = 5.0
ANSWER_SECONDS = 10.0  # to render and to send; Prometheus waits as long by default (scrape_timeout)
READ_BYTES = 4096


class MetricsServer:
    """The server of the page. `observe` counts each RPC at its end, even where nothing is served.

    address: where it listens, None without a configured address.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._agent = CollectorRegistry()
        ProcessCollector(registry=self._agent)
        self._lock = asyncio.Lock()
        self._made: tuple[float, bytes] | None = None  # the last page, and when its rendering began
        self.observe = RpcMetrics(self._agent).observe
        self.address: tuple[str, int] | None = None

    @classmethod
    @asynccontextmanager
    async def open(cls, node: Node, address: str) -> AsyncIterator[Self]:
        """Serve on ``ADDRESS:PORT``, or nothing where it is empty. Port 0 is any free one."""
        server = cls(node)
        async with AsyncExitStack() as stack:
            if address:
                await stack.enter_async_context(server._listener(*split_address(address)).open())
            yield server

    def _listener(self, host: str, port: int) -> Listener:
        listening = listener.bind(host, port)
        self.address = listening.getsockname()[:2]
        return Listener(
            listening,
            self._serve,
            name="metrics server",
            places=MAX_CONNECTIONS,
            head_s=HEAD_SECONDS,
            tasks=self._node.tasks,
        )

    async def _serve(self, connection: socket.socket, place: Place) -> None:
        """Serve one request. What a client sends behind it is not read."""
        reader, writer = await asyncio.open_connection(sock=connection, limit=http1.MAX_HEAD_BYTES)
        try:
            writer.write(await self._answer(reader, place))
            writer.close()
            await writer.wait_closed()
        finally:
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader, place: Place) -> bytes:
        exchange = http1.Exchange()
        try:
            request = await _receive(exchange, reader)
        except http1.BadRequest as error:
            return exchange.refuse(400, str(error))
        if request.path != "/metrics":
            return exchange.refuse(404, "the only path is /metrics")
        if request.method not in ("GET", "HEAD"):
            return exchange.refuse(
                405, f"{request.method} is not supported", [("Allow", "GET, HEAD")]
            )
        place.keep(ANSWER_SECONDS)
        return exchange.answer(
            200, await self._page(), [("Content-Type", CONTENT_TYPE_PLAIN_0_0_4)]
        )

    async def _page(self) -> bytes:
        """A page that shows the node as it is now or later; all who wait at the same time get the same one."""
        loop = asyncio.get_running_loop()
        asked = loop.time()
        async with self._lock:
            # A page whose rendering began before this request may lack what had happened by then.
            if self._made is None or self._made[0] < asked:
                self._made = loop.time(), await self.render()
            return self._made[1]

    async def render(self) -> bytes:
        """Render the whole page."""
        now = CollectorRegistry()
        now.register(NodeCollector(self._node))
        now.register(UsageCollector(await self._node.stats.sandboxes()))
        now.register(LogCollector(await self._node.stats.logs()))
        return await asyncio.to_thread(
            lambda: b"".join(generate_latest(registry) for registry in (self._agent, now))
        )


async def _receive(exchange: http1.Exchange, reader: asyncio.StreamReader) -> http1.Request:
    """Read a request. Raises BadRequest, and ConnectionError where the client leaves before it is complete."""
    while data := await reader.read(READ_BYTES):
        if request := exchange.receive_data(data):
            return request
    raise ConnectionResetError("no request")
