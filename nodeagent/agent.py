"""The agent's process: one node, its sockets, and the signals that end it."""

import asyncio
import faulthandler
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

from nodeagent import control, probes
from nodeagent.config import Config, Streaming, split_address
from nodeagent.cri.features import Features
from nodeagent.cri.server import Server
from nodeagent.lifecycle.composition import open_node
from nodeagent.lifecycle.node import Node
from nodeagent.metrics.server import MetricsServer
from nodeagent.serving import descriptors, service_manager
from nodeagent.streaming.server import StreamingServer
from nodeagent.streaming.session import Timeouts
from nodeagent.streaming.tls import TLSFiles
from nodeagent.tasks import Tasks

log = logging.getLogger(__name__)

# An orderly end takes milliseconds. Calls under way have 2 s, changes 5 s more, and a container that is undone 10 s to
# end. After 90 s systemd kills an agent that has not ended (DefaultTimeoutStopSec, systemd-system.conf(5)).
STOP_SECONDS = 20.0


def run(config: Config) -> None:
    """Serve until SIGTERM or SIGINT. Running pods go on without the agent."""
    asyncio.run(_serve(config))
    log.info("stopped")


async def _serve(config: Config) -> None:
    descriptors.raise_limit()
    ending = _Ending()
    async with Tasks() as tasks:
        if period_s := service_manager.watchdog_seconds():
            tasks.keep(service_manager.WATCHDOG, partial(service_manager.feed_watchdog, period_s))
        # The CRI's socket opens last, when all that serves a call is there, and closes first.
        async with AsyncExitStack() as stack:
            try:
                with ending.cancels():
                    await _open(config, stack)
            except asyncio.CancelledError:
                if not ending.has_begun:
                    raise
                log.info("stopping while it starts")
                return
            log.info("serving CRI v1 on %s", config.listen)
            service_manager.notify(f"READY=1\nSTATUS=serving CRI v1 on {config.listen}")
            await ending.begun()
            service_manager.notify("STOPPING=1\nSTATUS=stopping")


async def _open(config: Config, stack: AsyncExitStack) -> None:
    """Open everything, which `stack` closes."""
    service_manager.notify("STATUS=opening the database, images and network")
    node = await stack.enter_async_context(open_node(config))
    await stack.enter_async_context(control.serve(config, node.images, node.tasks))
    metrics = await stack.enter_async_context(MetricsServer.open(node, config.metrics))
    streaming = await stack.enter_async_context(_streaming(node, config.streaming))
    await stack.enter_async_context(
        Server.open(
            node,
            config.listen,
            observe=metrics.observe,
            streaming=streaming,
            features=_features(config, node),
            also=_earlier_socket(config, node),
        )
    )


def _earlier_socket(config: Config, node: Node) -> str:
    """The socket of the first versions, needed while pods of theirs run, as the kubelet may still use it; else "".

    Only for the default `listen`: whoever configures it has one socket.
    """
    if not node.places.is_earlier or config.listen != Config().listen:
        return ""
    socket_path = f"unix://{node.places.home}/nodeagent.sock"
    log.warning(
        "serving CRI v1 on %s as well until no pod is left: configure its clients to use the new socket",
        socket_path,
    )
    return socket_path


class _Ending:
    """The end that SIGTERM and SIGINT ask for, within STOP_SECONDS, also where it does not come to an end by itself.

    A thread hears the signals: the event loop may be blocked, or have ended and wait for threads.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._begun = asyncio.Event()
        self._cancelled: asyncio.Task[object] | None = None
        self._heard, told = socket.socketpair()
        told.setblocking(False)
        self._told = told
        signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _leave_to_thread)
        threading.Thread(target=self._hear, name="signals", daemon=True).start()

    @property
    def has_begun(self) -> bool:
        return self._begun.is_set()

    async def begun(self) -> None:
        await self._begun.wait()

    @contextmanager
    def cancels(self) -> Iterator[None]:
        """Have the end cancel what the caller does meanwhile."""
        self._cancelled = asyncio.current_task()
        try:
            yield
        finally:
            self._cancelled = None

    def _hear(self) -> None:
        deadline: float | None = None
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            try:
                if left is not None and left <= 0:
                    raise TimeoutError
                self._heard.settimeout(left)
                numbers = self._heard.recv(64)
            except TimeoutError:
                _give_up(self._loop)
            for number in set(numbers) & {signal.SIGTERM, signal.SIGINT}:
                log.info("stopping: %s", signal.Signals(number).name)
                if deadline is None:
                    deadline = time.monotonic() + STOP_SECONDS
                    with suppress(RuntimeError):  # the loop has ended by itself
                        self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        self._begun.set()
        if self._cancelled is not None:
            self._cancelled.cancel()


def _leave_to_thread(_number: int, _frame: object) -> None:
    """The number has been written to the descriptor that the thread reads (signal.set_wakeup_fd)."""


def _give_up(loop: asyncio.AbstractEventLoop) -> NoReturn:
    """End as if killed, which the next start can repair: what runs goes on, what was interrupted is undone."""
    try:
        left = "; ".join(sorted({_what(task) for task in asyncio.all_tasks(loop)}))
        log.error(
            "stopping: gave up after %g s; still running: %s", STOP_SECONDS, left or "no task"
        )
        faulthandler.dump_traceback()  # a thread that is blocked is not among the tasks
    finally:
        os._exit(1)


def _what(task: "asyncio.Task[object]") -> str:
    """The coroutine that a task runs, and the name that it was given."""
    what, name = getattr(task.get_coro(), "__qualname__", "a task"), task.get_name()
    return what if name.startswith("Task-") else f"{what}: {name}"


def _features(config: Config, node: Node) -> Features:
    try:
        mapped = probes.maps_ids(Path(config.root))
    except OSError as error:
        log.warning("no pod can have a user namespace: %s", error)
        mapped = False
    return Features(
        user_namespaces=mapped,
        user_namespaces_host_network=mapped,
        cgroup_namespaces=Path("/proc/self/ns/cgroup").exists(),
        cgroup_mount_mode=node.cgroups.delegates,
        seccomp_profile_oci=probes.compiles_filters(),
    )


def _streaming(node: Node, config: Streaming) -> StreamingServer:
    host, port = split_address(config.address)
    tls = None
    if config.tls_cert:
        tls = TLSFiles(
            certificate=config.tls_cert, key=config.tls_key, client_ca=config.client_ca or None
        )
    timeouts = Timeouts(
        creation_s=config.creation_timeout_seconds, idle_s=config.idle_timeout_seconds
    )
    return StreamingServer(
        node.sessions, node.tasks, host=host, port=port, tls=tls, timeouts=timeouts
    )
