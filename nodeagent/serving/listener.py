"""Accepting connections within bounds, for servers that any process of the node can connect to.

A connection has one of a limited number of places, and a limited time to send its request. When no place is left, the
oldest connection without a request is closed for the new one. So clients that send their request at once are served,
however many others send nothing.
"""

import asyncio
import ipaddress
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from nodeagent.serving import descriptors
from nodeagent.tasks import Tasks, cancel

# A connection is not closed for another one before it has had this time, which also bounds how fast a client that
# connects again and again displaces others.
PROTECTED_S = 0.2
LONGEST_PAUSE_S = 1.0  # between failures of the server itself
PAUSE_S = 0.1  # without descriptors: the connection stays in the queue, and accept(2) would fail again at once
BACKLOG = 256
COMPLAINT_INTERVAL_S = 60.0

log = logging.getLogger(__name__)


def bind(host: str, port: int) -> socket.socket:
    """Make a TCP socket that listens on a literal address. Raises OSError with the address."""
    family = socket.AF_INET if ipaddress.ip_address(host).version == 4 else socket.AF_INET6
    listening = socket.create_server((host, port), family=family, backlog=BACKLOG)
    listening.setblocking(False)
    return listening


def bind_unix(path: Path) -> socket.socket:
    """Make a Unix stream socket that only its owner can connect to, in place of what is at the path."""
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        os.fchmod(listening.fileno(), 0o600)  # bind(2) gives the file the mode of the socket
        listening.bind(str(path))
        listening.listen(BACKLOG)
    except BaseException:
        listening.close()
        raise
    return listening


class Place:
    """One of the limited number of places, held by a connection while it is served."""

    def __init__(self, head_s: float) -> None:
        now = asyncio.get_running_loop().time()
        self.protected_until = now + PROTECTED_S
        self.kept = False
        self.patience = asyncio.timeout_at(now + head_s)

    def keep(self, seconds: float | None = None) -> None:
        """Keep the place, as the request has arrived: until this time is over, if one is given."""
        self.kept = True
        now = asyncio.get_running_loop().time()
        self.patience.reschedule(None if seconds is None else now + seconds)


Serve = Callable[[socket.socket, Place], Coroutine[Any, Any, None]]


class Listener:
    """A listening socket. Runs `serve` for each connection, and cancels it when its time is over or its place needed.

    serve: owns the connection, and returns when it has closed it or handed it on. name: of the server and its task.
    head_s: the time until `Place.keep`.
    """

    def __init__(
        self,
        listening: socket.socket,
        serve: Serve,
        *,
        name: str,
        places: int,
        head_s: float,
        tasks: Tasks,
    ) -> None:
        self._listening = listening
        self._serve = serve
        self._name = name
        self._limit = places
        self._head_s = head_s
        self._tasks = tasks
        self._loop = asyncio.get_running_loop()
        self._places: dict[Place, asyncio.Task[None]] = {}  # the oldest first
        self._freed = asyncio.Event()
        self._silent_until = 0.0

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Accept while the block runs. On leaving it, all `serve` calls that still run are cancelled."""
        with self._listening:
            keeper = self._tasks.keep(self._name, self._run, longest_pause_seconds=LONGEST_PAUSE_S)
            try:
                yield
            finally:
                await cancel(keeper)

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            while True:
                connection = await self._accept()
                try:
                    await self._make_room()
                except BaseException:
                    connection.close()
                    raise
                place = Place(self._head_s)
                self._places[place] = tasks.create_task(self._occupy(place, connection))
                # One connection in each turn of the loop, so that a flood of them leaves time for everything else; and
                # the new task makes its first step, before which it could be cancelled without closing the connection.
                await asyncio.sleep(0)

    async def _accept(self) -> socket.socket:
        """Wait for the next connection for which there is a descriptor."""
        while True:
            try:
                connection, _ = await self._loop.sock_accept(self._listening)
            except OSError as error:
                self._complain(error.strerror or str(error))
            else:
                if not descriptors.is_reserved(connection.fileno()):
                    return connection
                connection.close()
                self._complain(
                    "no file descriptors are left but those reserved for the CRI; raise LimitNOFILE"
                )
            await asyncio.sleep(PAUSE_S)

    def _complain(self, reason: str) -> None:
        """Log why connections are refused, at most once a minute."""
        now = self._loop.time()
        if now >= self._silent_until:
            self._silent_until = now + COMPLAINT_INTERVAL_S
            log.warning("%s: connections are refused: %s", self._name, reason)

    async def _make_room(self) -> None:
        """Wait until a place is free, closing the oldest connection without a request if need be."""
        while len(self._places) >= self._limit:
            oldest = next((place for place in self._places if not place.kept), None)
            look_again_at = None if oldest is None else oldest.protected_until
            if oldest is not None and oldest.protected_until <= self._loop.time():
                self._places[oldest].cancel()
                look_again_at = None
            self._freed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(look_again_at):
                    await self._freed.wait()

    async def _occupy(self, place: Place, connection: socket.socket) -> None:
        try:
            async with place.patience:
                await self._serve(connection, place)
        except OSError as error:  # a TimeoutError is one: the client is gone, or too slow
            log.debug("%s: %r", self._name, error)
        except Exception:
            log.exception("%s: a connection failed", self._name)
        finally:
            del self._places[place]
            self._freed.set()
