"""A session of port-forward: TCP connections into a pod, each pumped between the wire and a socket."""

import asyncio
import logging
import socket
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from nodeagent.errors import NodeAgentError, ResourceExhausted
from nodeagent.serving import descriptors
from nodeagent.streaming.backend import Backend, PortForwardRequest
from nodeagent.streaming.portforward import (
    Aborted,
    Closed,
    Connect,
    Event,
    Input,
    InputEnded,
    Wire,
)
from nodeagent.streaming.pump import Sink, Source
from nodeagent.streaming.session import Session, Timeouts

EXPIRY_CHECKS = 4  # in the time that a pair of streams has to become one

log = logging.getLogger(__name__)


class ForwardSession(Session[Event]):
    """A session that dials for each connection of the client; the failure of one does not end the others."""

    def __init__(
        self, wire: Wire, request: PortForwardRequest, backend: Backend, timeouts: Timeouts
    ) -> None:
        super().__init__(wire, timeouts)
        self._wire: Wire = wire
        self._request = request
        self._backend = backend
        self._connections: dict[int, _Connection] = {}
        self._finished = asyncio.Event()
        self._tasks: asyncio.TaskGroup

    async def serve(self, early: bytes) -> None:
        async with asyncio.TaskGroup() as self._tasks:
            expiry = self._tasks.create_task(self._expire())
            self.listen(early)
            await self._finished.wait()
            expiry.cancel()

    def handle(self, event: Event) -> None:
        match event:
            case Connect(number, port):
                self._connect(number, port)
            case Input(number, data) if number in self._connections:
                self._connections[number].sink.write(data)
            case InputEnded(number) if number in self._connections:
                self._connections[number].sink.end()
            case Aborted(number) if number in self._connections:
                self._connections[number].task.cancel()
            case Closed():
                self.leave()

    async def _expire(self) -> None:
        """Reset streams that have waited too long for the other stream of their pair."""
        while True:
            await asyncio.sleep(self.timeouts.creation_s / EXPIRY_CHECKS)
            self._wire.expire(self.loop.time() - self.timeouts.creation_s)
            self.flush()

    # --- one connection ---

    def _connect(self, number: int, port: int) -> None:
        sink = Sink(self.backlog)
        task = self._tasks.create_task(self._carry(number, port, sink))
        task.add_done_callback(lambda _: self._forget(number))
        self._connections[number] = _Connection(sink, task)

    def _forget(self, number: int) -> None:
        self._connections.pop(number).sink.discard()
        self._wire.close(number)
        if self._wire.finished:
            self._finished.set()
        self.flush()

    async def _carry(self, number: int, port: int, sink: Sink) -> None:
        try:
            target = await self._dial(port)
        except (NodeAgentError, OSError) as error:  # a TimeoutError is an OSError
            self._wire.refuse(number, f"port {port}: {error}")
        except Exception:
            log.exception('port %d of pod sandbox "%s" failed', port, self._request.sandbox_id)
            self._wire.refuse(number, f"port {port}: internal error of the node agent")
        else:
            with target:
                await self._pump(number, target, sink)

    async def _dial(self, port: int) -> socket.socket:
        target = await self._backend.dial(self._request, port)
        if descriptors.is_reserved(target.fileno()):
            target.close()
            raise ResourceExhausted(
                "the node agent has no file descriptors left for it; try again later"
            )
        return target

    async def _pump(self, number: int, target: socket.socket, sink: Sink) -> None:
        """Carry bytes until both directions have ended; a reset ends both."""
        sink.open(target.fileno(), partial(_end_input, target))
        source = Source(target.fileno(), self.flow, partial(self._output, number))
        try:
            await source.ended.wait()
            if self._wire.half_close and not source.failed:
                self._wire.end(number)
                self.flush()
                await sink.ended.wait()
        finally:
            source.close()
            sink.discard()

    def _output(self, number: int, data: bytes) -> None:
        self._wire.send(number, data)
        self.flush()


@dataclass(frozen=True, slots=True)
class _Connection:
    sink: Sink
    task: asyncio.Task[None]


def _end_input(target: socket.socket) -> None:
    with suppress(OSError):  # it has been reset
        target.shutdown(socket.SHUT_WR)
