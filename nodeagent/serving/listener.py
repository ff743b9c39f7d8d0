"""Accepting connections within bounds, for servers that anybody on the node can connect to.

A connection has one of a limited number of places, and a limited time to send its request. When no place is left, the
oldest connection without a request is closed for the new one. So clients that send their request at once are served,
however many others stay silent.
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

# A connection is not closed for another one before it has had this time, which also bounds how fast somebody who
# connects again and again displaces others.
PROTECTED_S = 0.2
LONGEST_PAUSE_S = 1.0  # between failures of the server itself
PAUSE_S = 0.1  # when there are no descriptors; asking again at once would only burn time
BACKLOG = 256
COMPLAINT_INTERVAL_S = 60.0

log = logging.getLogger(__name__)


def bind(host: str, port: int) -> socket.socket:
    """A TCP socket that listens on a literal address. Raises OSError with the address."""
    family = socket.AF_INET if ipaddress.ip_address(host).version == 4 else socket.AF_INET6
    listening = socket.create_server((host, port), family=family, backlog=BACKLOG)
    listening.setblocking(False)
    return listening


def bind_unix(path: Path) -> socket.socket:
    """A stream socket that only its owner can connect to. What has its name already is replaced."""
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
    """Held by a connection while it is served."""

    def __init__(self, head_s: float) -> None:
        now = asyncio.get_running_loop().time()
        self.protected_until = now + PROTECTED_S
        self.kept = False
        self.patience = asyncio.timeout_at(now + head_s)

    def keep(self, seconds: float | None = None) -> None:
        """The request is here: the connection is not closed for others, and only after this time, if any."""
        self.kept = True
        now = asyncio.get_running_loop().time()
        self.patience.reschedule(None if seconds is None else now + seconds)


Serve = Callable[[socket.socket, Place], Coroutine[Any, Any, None]]


class Listener:
    """Runs `serve` for each connection, and cancels it when its time is over or its place is needed.

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
        """Accept while the block runs. On leaving, what still serves a connection is cancelled."""
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
        """The next connection that there are descriptors for."""
        while True:
            try:
                connection, _ = await self._loop.sock_accept(self._listening)
            except OSError as error:
                self._complain(error.strerror or str(error))
            else:
                if not descriptors.is_reserved(connection.fileno()):
                    return connection
                connection.close()
                self._complain("the descriptors that are left are reserved for the CRI")
            await asyncio.sleep(PAUSE_S)

    def _complain(self, reason: str) -> None:
        """Say why nobody can connect, but not for each who tries."""
        now = self._loop.time()
        if now >= self._silent_until:
            self._silent_until = now + COMPLAINT_INTERVAL_S
            log.warning("%s: connections are refused: %s", self._name, reason)

    async def _make_room(self) -> None:
        """Return when one more connection can have a place."""
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
