"""The streaming server: listens, answers upgrade requests that bring a ticket, and runs their sessions.

An RPC gets a URL for a request from `StreamingServer.url`; the client that connects there gets the session. Everything
that only decides is in other modules, without IO: this module and the sessions move the bytes.
"""

import asyncio
import ipaddress
import logging
import socket
import ssl
from contextlib import AsyncExitStack
from functools import partial
from typing import Self

from nodeagent.serving import http1, listener
from nodeagent.serving.listener import Listener, Place
from nodeagent.streaming import upgrade
from nodeagent.streaming.backend import Backend, PortForwardRequest, Request
from nodeagent.streaming.command import CommandSession
from nodeagent.streaming.forward import ForwardSession
from nodeagent.streaming.session import LINGER_S, Timeouts
from nodeagent.streaming.tls import TLSFiles
from nodeagent.streaming.tokens import Tickets
from nodeagent.streaming.upgrade import Refused
from nodeagent.tasks import Tasks

MAX_HANDSHAKES = 256
MAX_SESSIONS = 1000
TLS_FILES = "streaming TLS files"

log = logging.getLogger(__name__)

AnySession = CommandSession | ForwardSession


class StreamingServer:
    """The streaming server, which serves while its context is open.

    ::

        async with StreamingServer(backend, tasks) as server:
            url = server.url(ExecRequest(container_id=..., command=("ls",), stdout=True))
    """

    def __init__(
        self,
        backend: Backend,
        tasks: Tasks,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: TLSFiles | None = None,
        timeouts: Timeouts | None = None,
    ) -> None:
        """Prepare a server. host: a literal address; port 0: any free one.

        Entering it raises OSError where a file of tls, or the address, cannot be used.
        """
        self.timeouts = timeouts or Timeouts()
        self._backend = backend
        self._host = ipaddress.ip_address(host)
        self._port = port
        self._tls = tls
        self._context: ssl.SSLContext | None = None
        self._tickets = Tickets()
        self._sessions: set[asyncio.Task[None]] = set()
        self._listening: socket.socket
        self._tasks = tasks.part()
        self._stack: AsyncExitStack

    async def __aenter__(self) -> Self:
        # Before the files are read: a change in between is then seen by the next check.
        version = None if self._tls is None else self._tls.version()
        self._context = None if self._tls is None else self._tls.load()
        self._listening = listener.bind(str(self._host), self._port)
        handshakes = Listener(
            self._listening,
            self._shake_hands,
            name="streaming server",
            places=MAX_HANDSHAKES,
            head_s=self.timeouts.head_s,
            tasks=self._tasks,
        )
        # Left in reverse: no more connections are accepted, then the sessions are cancelled and awaited.
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._tasks.close)
            if self._tls is not None:
                self._tasks.keep(TLS_FILES, partial(self._follow, self._tls, version))
            await stack.enter_async_context(handshakes.open())
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    def url(self, request: Request) -> str:
        """A URL at which a client gets the session for a request, once, within a minute. Raises as `Tickets.issue`."""
        token = self._tickets.issue(request)
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://{self._authority}/{request.path}/{token}"

    @property
    def _authority(self) -> str:
        """The host and port for URLs: loopback in place of a wildcard address, as clients come from this node."""
        port = self._listening.getsockname()[1]
        if self._host.version == 4:
            return f"{'127.0.0.1' if self._host.is_unspecified else self._host}:{port}"
        return f"[{'::1' if self._host.is_unspecified else self._host}]:{port}"

    async def _follow(self, tls: TLSFiles, version: object) -> None:
        """Load changed certificate files, if they are valid; existing connections keep the old ones."""
        while True:
            await asyncio.sleep(self.timeouts.tls_check_s)
            try:
                current = await asyncio.to_thread(tls.version)
                if current == version:
                    continue
                version = current
                self._context = await asyncio.to_thread(tls.load)
            except OSError as error:
                self._tasks.failures.note(TLS_FILES, error, then="; the server keeps the old ones")
                continue
            log.info("the streaming server has loaded new TLS files")

    # --- clients ---

    async def _shake_hands(self, connection: socket.socket, _: Place) -> None:
        """Serve a client until its session starts, or it is refused. Its time limit includes the handshake of TLS."""
        # A client that vanished without a FIN is found by probes (tcp(7)): sessions may be silent for hours.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        handshake = Handshake(self)
        await asyncio.get_running_loop().connect_accepted_socket(
            lambda: handshake,
            connection,
            ssl=self._context,
            ssl_shutdown_timeout=None if self._context is None else LINGER_S,
        )
        await handshake.finish()

    def agree(self, request: http1.Request) -> tuple[upgrade.Answer, AnySession]:
        """The headers of the answer to a request, and the session that follows. Raises Refused where there is none."""
        if request.method not in ("GET", "POST"):
            raise Refused(405, f"{request.method} is not supported", [("Allow", "GET, POST")])
        path, _, token = request.path.removeprefix("/").partition("/")
        ticket = self._tickets.redeem(path, token)
        if ticket is None:
            raise Refused(404, "there is no such session, or its time is over")
        if len(self._sessions) >= MAX_SESSIONS:
            raise Refused(503, f"{MAX_SESSIONS} sessions are open, which is the limit")
        if isinstance(ticket, PortForwardRequest):
            clock = asyncio.get_running_loop().time
            answer, wire = upgrade.forward(request, ticket, clock)
            return answer, ForwardSession(wire, ticket, self._backend, self.timeouts)
        answer, command = upgrade.command(request, ticket)
        return answer, CommandSession(command, ticket, self._backend, self.timeouts)

    def start(self, session: AnySession, early: bytes) -> None:
        task = self._tasks.run("streaming session", session.run(early))
        self._sessions.add(task)
        task.add_done_callback(self._sessions.discard)


class Handshake(asyncio.Protocol):
    """The protocol of a connection until it is upgraded, or its request refused."""

    def __init__(self, server: StreamingServer) -> None:
        self._server = server
        self._http = http1.Exchange()
        self._transport: asyncio.Transport
        self._switched = False
        self._over = asyncio.Event()

    async def finish(self) -> None:
        """Return when the connection belongs to a session, or is closed. Closes it if cancelled."""
        try:
            await self._over.wait()
        finally:
            if not self._switched:
                self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._transport.is_closing():
            return
        try:
            request = self._http.receive_data(data)
            if request is not None:
                self._switch(*self._server.agree(request))
        except http1.BadRequest as error:
            self._refuse(400, str(error))
        except Refused as refusal:
            self._refuse(refusal.status, refusal.text, refusal.headers)

    def connection_lost(self, exc: Exception | None) -> None:
        self._over.set()

    def _switch(self, answer: upgrade.Answer, session: AnySession) -> None:
        """Hand the connection over to its session."""
        self._switched = True
        self._over.set()
        # The session resumes reading when it runs: what has come by then is behind the request, in `trailing`.
        self._transport.pause_reading()
        self._transport.write(self._http.switch(answer))
        self._transport.set_protocol(session)
        session.connection_made(self._transport)
        self._server.start(session, self._http.trailing)

    def _refuse(self, status: int, text: str, headers: upgrade.Answer | None = None) -> None:
        self._transport.write(self._http.refuse(status, text, headers or []))
        self._transport.close()
