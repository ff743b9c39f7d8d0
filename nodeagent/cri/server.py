"""The CRI's gRPC server on its Unix socket.

The table of methods is read from the contract itself: each RPC is served by the method of its name, so that a missing
implementation is found at the start, not by a client.
"""

import asyncio
import errno
import os
import socket
import stat
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from nodeagent import files
from nodeagent.api import runtime_pb2 as pb
from nodeagent.cri import reachability
from nodeagent.cri.features import Features
from nodeagent.cri.image_service import ImageService
from nodeagent.cri.interceptors import Calls, Observe, Reply
from nodeagent.cri.runtime_service import runtime_service
from nodeagent.cri.runtime_streams import Streaming
from nodeagent.errors import AlreadyExists
from nodeagent.lifecycle.node import Node

MAX_MESSAGE_BYTES = 16 << 20  # what the kubelet and crictl receive at most
MAX_CALLS = 2_000
MAX_CONNECTIONS = 256
MAX_CALLS_OF_CONNECTION = 1_000
HANDSHAKE_SECONDS = 10  # until a client has said that it speaks HTTP/2
IDLE_SECONDS = 600  # without a call; a client connects again when it has one
GRACE_SECONDS = 2.0
SOCKET_MODE = 0o660

# Whoever may connect is trusted. The bounds are for a client with a bug: without them its connections, or its calls,
# leave nothing for the others.
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
    ("grpc.max_concurrent_streams", MAX_CALLS_OF_CONNECTION),
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_SECONDS * 1000),
    ("grpc.max_connection_idle_ms", IDLE_SECONDS * 1000),
)


class Server:
    """Serves both services of a node until it is left."""

    def __init__(
        self, node: Node, observe: Observe, streaming: Streaming | None, features: Features
    ) -> None:
        self._calls = Calls(observe, node.tasks)
        self._tasks = node.tasks.part()
        self._services = (
            _handlers("RuntimeService", runtime_service(node, streaming, features), self._calls),
            _handlers("ImageService", (ImageService(node),), self._calls),
        )
        self._paths: list[Path] = []
        self._servers: list[grpc.aio.Server] = []  # the last one accepts connections

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        node: Node,
        listen: str,
        *,
        observe: Observe,
        streaming: Streaming | None = None,
        features: Features | None = None,
        also: str = "",
    ) -> AsyncIterator[Self]:
        """Serve while the block runs. listen: ``unix:///path``; also: another one, if any.

        Raises `AlreadyExists` where another process listens there.
        """
        server = cls(node, observe, streaming, features or Features())
        await server._start([Path(one.removeprefix("unix://")) for one in (listen, also) if one])
        try:
            yield server
        finally:
            await server._stop()

    async def _start(self, paths: Iterable[Path]) -> None:
        for path in paths:
            files.ensure_directory(str(path.parent))
            remove_stale_socket(path)
            self._paths.append(path)
        await self._listen()
        self._tasks.keep(
            reachability.TASK, partial(reachability.keep, self._paths, self._serve_anew)
        )

    async def _listen(self) -> None:
        server = grpc.aio.server(options=_OPTIONS, maximum_concurrent_rpcs=MAX_CALLS)
        server.add_generic_rpc_handlers(self._services)
        for path in self._paths:
            _bind(server, path)
        await server.start()
        self._servers.append(server)

    async def _serve_anew(self) -> None:
        """Make the sockets anew; the connections that there are stay with the server that has them."""
        for path in self._paths:
            path.unlink(missing_ok=True)
        await self._listen()

    async def _stop(self) -> None:
        """Accept no further call, end the streams, and finish the changes under way."""
        await self._tasks.close()
        async with asyncio.TaskGroup() as stops:
            for server in self._servers:
                stops.create_task(server.stop(GRACE_SECONDS))
        await self._calls.drain()


def _bind(server: grpc.aio.Server, path: Path) -> None:
    """Listen on a socket that has the right mode from the start."""
    # gRPC gives no mode to bind(2), which then makes the socket with 0777 less the umask; a chmod afterwards
    # would leave a moment in which others can connect.
    old = os.umask(0o777 & ~SOCKET_MODE)
    try:
        server.add_insecure_port(f"unix://{path}")
    finally:
        os.umask(old)


def remove_stale_socket(path: Path) -> None:
    """Remove a socket that no process listens on. Raises `AlreadyExists` for anything else at this path."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise AlreadyExists(f"{path}: exists and is not a socket; move it away")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        # ECONNREFUSED alone proves that no process listens: a full backlog is EAGAIN (connect(2)).
        if probe.connect_ex(str(path)) != errno.ECONNREFUSED:
            raise AlreadyExists(f"{path}: another process listens there")
    path.unlink()


def _handlers(
    service: str, parts: Iterable[object], calls: Calls
) -> "grpc.GenericRpcHandler[Any, Any]":
    descriptor = pb.DESCRIPTOR.services_by_name[service]
    return grpc.method_handlers_generic_handler(
        descriptor.full_name,
        {method.name: _handler(method, parts, calls) for method in descriptor.methods},
    )


def _handler(
    method: MethodDescriptor, parts: Iterable[object], calls: Calls
) -> "grpc.RpcMethodHandler[Any, Any]":
    make, wrap = (
        (grpc.unary_stream_rpc_method_handler, calls.stream)
        if method.server_streaming
        else (grpc.unary_unary_rpc_method_handler, calls.unary)
    )
    return make(
        wrap(method.name, _behaviour(method.name, parts)),
        request_deserializer=GetMessageClass(method.input_type).FromString,
        response_serializer=_serialize,
    )


def _behaviour(name: str, parts: Iterable[object]) -> Any:
    for part in parts:
        if hasattr(part, name):
            return getattr(part, name)
    raise LookupError(f"{name}: no class has a method for this RPC")


def _serialize(reply: Reply) -> bytes:
    return reply.SerializeToString() if isinstance(reply, Message) else reply
