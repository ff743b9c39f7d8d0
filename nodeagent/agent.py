"""The agent's process: one node, its sockets, and the signals that end it."""

import asyncio
import logging
import os
import signal
import socket
from contextlib import AsyncExitStack

from nodeagent import control
from nodeagent.config import Config
from nodeagent.cri.server import Server
from nodeagent.lifecycle.node import open_node
from nodeagent.metrics.server import MetricsServer

log = logging.getLogger(__name__)


async def serve(config: Config) -> None:
    """Serve until SIGTERM or SIGINT. Pods that run go on without us."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        node = await stack.enter_async_context(open_node(config))
        await stack.enter_async_context(control.serve(config, node.images))
        metrics = await stack.enter_async_context(MetricsServer.open(node, config.metrics))
        await stack.enter_async_context(Server.open(node, config.listen, observe=metrics.observe))
        log.info("serving CRI v1 on %s", config.listen)
        notify("READY=1")
        await stop.wait()
        notify("STOPPING=1")


def notify(state: str) -> None:
    """Tell the service manager (sd_notify(3)); without one there is nobody to tell."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.sendto(state.encode(), address)
