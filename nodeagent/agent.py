"""The agent's process: one node, its sockets, and the signals that end it."""

import asyncio
import faulthandler
import logging
import os
import signal
import socket
import threading
from contextlib import AsyncExitStack
from pathlib import Path

from nodeagent import control, probes
from nodeagent.config import Config, Streaming, split_address
from nodeagent.cri.features import Features
from nodeagent.cri.server import Server
from nodeagent.lifecycle.composition import open_node
from nodeagent.lifecycle.node import Node
from nodeagent.metrics.server import MetricsServer
from nodeagent.serving import descriptors
from nodeagent.streaming.server import StreamingServer
from nodeagent.streaming.session import Timeouts
from nodeagent.streaming.tls import TLSFiles

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
    stop = asyncio.Event()
    _end_on_signals(stop)
    # The CRI's socket opens last, when all that serves a call is there, and closes first.
    async with AsyncExitStack() as stack:
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
        log.info("serving CRI v1 on %s", config.listen)
        notify("READY=1")
        await stop.wait()
        notify("STOPPING=1")


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


def _end_on_signals(stop: asyncio.Event) -> None:
    """Have SIGTERM and SIGINT set `stop`, and end the process within STOP_SECONDS even if that does not end it."""
    loop = asyncio.get_running_loop()

    def end(number: signal.Signals) -> None:
        log.info("stopping: %s", number.name)
        if stop.is_set():
            return
        stop.set()
        # A thread, because the loop's own may be blocked, or have left the loop and wait for other threads.
        timer = threading.Timer(STOP_SECONDS, _give_up, (loop,))
        timer.daemon = True
        timer.start()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, number)


def _give_up(loop: asyncio.AbstractEventLoop) -> None:
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


def notify(state: str) -> None:
    """Tell the service manager (sd_notify(3)), if there is one."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.sendto(state.encode(), address)
