"""A connection after its upgrade: its wire, flow control in both directions, and its end.

When a client does not read, the output of processes is not read any more (`FlowControl`). What a process does not read
is kept up to a bound, then the connection is not read any more. So a session holds a bounded number of bytes.
"""

import asyncio
import select
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from nodeagent.streaming.pump import Backlog, FlowControl

MAX_OUTPUT_BYTES = 256 << 10  # with more unsent bytes, no process is read from
MAX_REPLY_BYTES = 512 << 10  # with more unsent bytes, the client is not read from
MAX_INPUT_BYTES = (
    512 << 10
)  # with more bytes that processes have not read, the client is not read from
LINGER_S = 10.0
HANGUP_CHECK_S = 5.0

E = TypeVar("E")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """The time limits of a session.

    head_s: for the request, with TLS. creation_s: for the client's streams. idle_s: without a byte in either direction.
    first_size_s: for the size of a terminal, before the process starts without. last_output_s: for others that hold the
    output of a process that has ended. tls_check_s: between two checks of the certificate files.
    """

    head_s: float = 10.0
    creation_s: float = 30.0
    idle_s: float = 4 * 3600.0
    first_size_s: float = 0.1
    last_output_s: float = 1.0
    tls_check_s: float = 10.0


class Wire(Protocol[E]):
    """The methods that the wires of commands and of forwards have in common."""

    def receive_data(self, data: bytes) -> list[E]: ...

    def data_to_send(self) -> list[bytes]: ...

    def keep_alive(self) -> None:
        """Send something without meaning that needs no answer."""


class Session(asyncio.Protocol, ABC, Generic[E]):
    """The session of one client. `run` serves it to its end, and is cancelled when the client leaves earlier."""

    def __init__(self, wire: Wire[E], timeouts: Timeouts) -> None:
        self.flow = FlowControl()
        self.backlog = Backlog(self.balance)
        self.timeouts = timeouts
        self.loop = asyncio.get_running_loop()
        self._wire = wire
        self._transport: asyncio.Transport
        self._task: asyncio.Task[None] | None = None
        self._gone = asyncio.Event()
        self._over = False
        self._active = self.loop.time()
        self._idle = self.loop.call_later(timeouts.idle_s, self._check_idle)
        self._hangup: asyncio.TimerHandle | None = None

    # --- what each kind of session implements ---

    @abstractmethod
    async def serve(self, early: bytes) -> None:
        """Call `listen`, and return when the wire has been given everything that the client is to receive."""

    @abstractmethod
    def handle(self, event: E) -> None:
        """Act on an event of the wire."""

    def explain(self, reason: str) -> None:
        """Have the wire tell the client why its session ends, if it has a way to."""

    # --- the session from start to end ---

    async def run(self, early: bytes) -> None:
        """Serve the client to the end. early: the bytes that it sent behind its request."""
        self._task = asyncio.current_task()
        if self._gone.is_set():
            return
        try:
            await self.serve(early)
            await self._hang_up()
        except asyncio.CancelledError:
            self._break_off("the node agent stops")
            raise
        finally:
            self._transport.close()

    def listen(self, early: bytes) -> None:
        """Handle the early bytes, and read on."""
        self.data_received(early)
        self.balance()

    def leave(self) -> None:
        """End the session early: only what the wire still has to send is sent."""
        self._over = True
        self.flush()
        if self._task is not None:
            self._task.cancel()

    def _break_off(self, reason: str) -> None:
        """Tell a client that is still there why its session ends.

        client-go takes the end of a SPDY connection for the end of the command, with exit code 0.
        """
        if not self._over and not self._transport.is_closing():
            self.explain(reason)
            self.flush()
            self._over = True

    def flush(self) -> None:
        """Send what the wire has to send."""
        chunks = self._wire.data_to_send()
        if chunks and not self._transport.is_closing():
            self._active = self.loop.time()
            self._transport.write(b"".join(chunks))

    def balance(self) -> None:
        """Read from the client while the bytes that are kept for it are within bounds, else pause."""
        if self._transport.is_closing():
            return
        kept, unsent = self.backlog.size, self._transport.get_write_buffer_size()
        if kept > MAX_INPUT_BYTES or unsent > MAX_REPLY_BYTES:
            self._pause()
        elif kept <= MAX_INPUT_BYTES // 2:
            self._transport.resume_reading()

    async def _hang_up(self) -> None:
        """Send all that is left, end the server's direction, and give the client time to read it.

        TLS does so when it closes. Closing a socket with unread bytes sends a reset, which may cost the client the end
        of its output (RFC 2525, 2.17): so it is read until the client closes.
        """
        self._over = True
        self.flush()
        self._transport.set_write_buffer_limits(high=1)  # TLS takes 0 for always full
        self._transport.resume_reading()
        await self.flow.opened.wait()
        if self._transport.can_write_eof():
            self._transport.write_eof()
            with suppress(TimeoutError):
                async with asyncio.timeout(LINGER_S):
                    await self._gone.wait()

    def _pause(self) -> None:
        self._transport.pause_reading()
        if self._hangup is None:
            self._hangup = self.loop.call_later(HANGUP_CHECK_S, self._check_hangup)

    def _check_hangup(self) -> None:
        """Ask the kernel whether the client has left, while nothing is read from it.

        Its FIN may be behind bytes that are not read; a packet to a socket that it has closed is answered by a reset.
        client-go also gives up a WebSocket that is silent for a minute.
        """
        self._hangup = None
        if self._transport.is_reading():
            return
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket"), select.POLLRDHUP)
        if poll.poll(0):
            self._transport.abort()
            return
        self._wire.keep_alive()
        self._transport.write(b"".join(self._wire.data_to_send()))
        self._pause()

    def _check_idle(self) -> None:
        deadline = self._active + self.timeouts.idle_s
        if deadline <= self.loop.time():
            self._break_off(f"no byte has passed for {self.timeouts.idle_s:g} s")
            if self._task is not None:
                self._task.cancel()
            self._transport.abort()
        else:
            self._idle = self.loop.call_at(deadline, self._check_idle)

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=MAX_OUTPUT_BYTES)

    def data_received(self, data: bytes) -> None:
        if self._over or self._transport.is_closing():
            return
        self._active = self.loop.time()
        for event in self._wire.receive_data(data):
            self.handle(event)
        self.flush()
        self.balance()

    def pause_writing(self) -> None:
        self.flow.close()

    def resume_writing(self) -> None:
        self.flow.open()
        self.balance()

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone.set()
        self._idle.cancel()
        if self._hangup is not None:
            self._hangup.cancel()
        self.flow.open()
        if self._task is not None and not self._over:
            self._task.cancel()
