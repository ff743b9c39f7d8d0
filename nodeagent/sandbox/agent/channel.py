"""The agent's side of the protocol: requests and their replies on one connection, with asyncio.

A caller that is cancelled loses nothing but the reply: what was asked for is finished, and descriptors that come with
the reply are closed. Nothing is asked before the other side has said which versions of the protocol it speaks.

No request waits without an end (`deadlines`). A process that owes an answer and says nothing at all is `silent` until
it says something: it is stopped, or hangs in the kernel. A connection that ends while its process lives is not made
again here: whoever has the channel hears of it by `ended`.
"""

import asyncio
import itertools
import logging
import os
import signal
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from nodeagent.errors import (
    IncompatibleVersion,
    NodeAgentError,
    ResourceExhausted,
    Unavailable,
)
from nodeagent.linux import waiting
from nodeagent.sandbox import protocol
from nodeagent.sandbox.agent import deadlines
from nodeagent.sandbox.agent.silence import Silence
from nodeagent.sandbox.protocol import Body, Message

log = logging.getLogger(__name__)

_HELLO = 0  # the number of the first request

# A process that is killed ends within milliseconds, unless it hangs in the kernel.
_KILL_SECONDS = 5.0

# Until what could not be sent, as the socket had no room or the kernel no memory, is sent again.
_POST_AGAIN_SECONDS = 0.2


class Reply(NamedTuple):
    """A reply. fds: by name; they belong to the caller."""

    result: Mapping[str, Any]
    fds: dict[str, int]


class Channel:
    """One connection. `lost` is set when the process at the other end has died, `ended` when nothing comes any more.

    name: of that process, in errors. on_event: called with what comes unasked; on_end: when nothing comes any more.
    """

    def __init__(
        self,
        connection: socket.socket,
        name: str,
        on_event: Callable[[Body], None],
        on_end: Callable[[], None],
    ) -> None:
        self.name = name
        self.pid = protocol.peer_of(connection).pid
        self.lost = asyncio.Event()
        self.ended = asyncio.Event()
        self._connection = connection
        self._on_event = on_event
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count(1)
        self._pending: dict[int, asyncio.Future[Message]] = {}
        # A descriptor has one writer callback: a second request that waited for room would replace the first's.
        self._sending = asyncio.Lock()
        self._room = asyncio.Event()
        self._silence = Silence(
            name, self.pid, lambda: bool(self._pending), self._ask_whether_there
        )
        self._posts: deque[bytes] = deque()  # what could not be sent yet
        self._post_again: asyncio.TimerHandle | None = None
        self._is_open = True
        self._answered = asyncio.Event()
        self._refusal = ""
        connection.setblocking(False)
        # A hello that cannot be sent is no process that does not answer, which would be replaced: there is no channel.
        protocol.send(connection, protocol.encode(_hello(_HELLO)))
        self._pidfd = os.pidfd_open(self.pid)
        self._loop.add_reader(connection.fileno(), self._receive_all)
        self._loop.add_reader(self._pidfd, self._died)

    @classmethod
    async def connect(
        cls,
        path: str,
        name: str,
        on_event: Callable[[Body], None],
        on_end: Callable[[], None],
    ) -> "Channel":
        """Connect to a socket. Raises OSError where nobody listens, or a shortage is in the way."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            with protocol.address(path) as address:
                await asyncio.get_running_loop().sock_connect(connection, address)
            return cls(connection, name, on_event, on_end)
        except BaseException:
            connection.close()
            raise

    async def request(
        self, operation: str, fds: Sequence[tuple[str, int | None]] = (), **members: object
    ) -> Reply:
        """Make a request. Raises the error that the other side names, or Unavailable when it goes before it replies.

        Raises IncompatibleVersion where it speaks no version of the protocol that we do, and TimeoutError when it has
        not replied within the time that `deadlines` gives, which is short for one that is silent already. What was
        asked for may happen nevertheless.
        fds: named; they stay the caller's.
        """
        await self.agree()
        seconds, began = deadlines.SECONDS[operation], self._loop.time()
        if self.silent:
            seconds = min(seconds, deadlines.QUICK_SECONDS)
        try:
            async with asyncio.timeout(seconds):
                message = await self._ask(operation, fds, members)
        except TimeoutError:
            about = f' of container "{members["container"]}"' if "container" in members else ""
            raise TimeoutError(self._overdue(f'"{operation}"{about}', seconds, began)) from None
        if "error" in message.body:
            protocol.close_all(message.fds)
            raise protocol.read_error(message.body)
        result = message.body["result"]
        return Reply(result, dict(zip(result.get("fds", ()), message.fds, strict=True)))

    async def _ask(
        self, operation: str, fds: Sequence[tuple[str, int | None]], members: Mapping[str, object]
    ) -> Message:
        if not self._is_open:
            raise self.unavailable()  # before silence is watched, which has ended with the connection
        number = next(self._numbers)
        names, descriptors = protocol.named(fds)
        packet = protocol.encode({"id": number, "op": operation, "fds": names, **members})
        future: asyncio.Future[Message] = self._loop.create_future()
        self._pending[number] = future
        self._silence.watch()
        try:
            await self._send(packet, descriptors)
            return await future
        finally:
            # A reply that nobody waits for any more is recognised by its absence here.
            self._pending.pop(number, None)

    def _overdue(self, what: str, seconds: float, began: float) -> str:
        """The text for a request without an answer. began: the time at which it was made."""
        self._silence.overdue(began)
        if self.silent:
            return f"{self.name}: {what}: {self.silent}"
        return f"{self.name}: {what} has not been done within {seconds:g} s; it goes on"

    @property
    def is_open(self) -> bool:
        return self._is_open

    @property
    def silent(self) -> str:
        """Why the process does not answer; "" while it does."""
        return self._silence.text

    def post(self, operation: str, **members: object) -> None:
        """Ask for something whose outcome is of no interest, and which a request before has begun.

        What such a request has begun would go on for good without it: it is sent until that succeeds, in order.
        """
        if self._answered.is_set() and not self._refusal:
            body = {"id": next(self._numbers), "op": operation, **members}
            self._posts.append(protocol.encode(body))
            if self._post_again is None:
                self._send_posts()

    def _send_posts(self) -> None:
        is_first, self._post_again = self._post_again is None, None
        while self._posts and self._is_open:
            try:
                protocol.send(self._connection, self._posts[0])
            except OSError as error:
                if is_first:
                    log.warning("%s: a request is sent again: %s", self.name, error)
                self._post_again = self._loop.call_later(_POST_AGAIN_SECONDS, self._send_posts)
                return
            self._posts.popleft()

    def _ask_whether_there(self) -> None:
        """Put a question that is answered at once, also by a release that does not know it."""
        try:
            protocol.send(self._connection, protocol.encode(_hello(next(self._numbers))))
        except OSError as error:
            log.warning("%s: hello: %s", self.name, error)

    async def agree(self) -> None:
        """Return when it is known that both sides speak some version of the protocol, or nothing comes any more.

        Raises IncompatibleVersion where they do not, and TimeoutError when it is not known in time.
        """
        if not self._answered.is_set():
            seconds, began = deadlines.QUICK_SECONDS, self._loop.time()
            try:
                async with asyncio.timeout(seconds):
                    await self._answered.wait()
            except TimeoutError:
                raise TimeoutError(self._overdue('"hello"', seconds, began)) from None
        if self._refusal:
            raise IncompatibleVersion(self._refusal)

    def _hear(self, message: Message) -> None:
        """The answer to our ``hello``: an error is that of a release which does not know it."""
        protocol.close_all(message.fds)
        try:
            spoken = protocol.spoken_by(message.body.get("result", {}))
            protocol.require_common_version(self.name, spoken, "this agent")
        except IncompatibleVersion as error:
            self._refusal = str(error)
        self._answered.set()

    async def _send(self, packet: bytes, fds: Sequence[int]) -> None:
        async with self._sending:
            while self._is_open:
                try:
                    protocol.send(self._connection, packet, fds)
                except BlockingIOError:
                    await self._writable()
                except OSError:
                    break
                else:
                    return
        raise self.unavailable()

    async def _writable(self) -> None:
        """Return when there is room, or the connection has ended."""
        self._room.clear()
        descriptor = self._connection.fileno()
        self._loop.add_writer(descriptor, self._room.set)
        try:
            await self._room.wait()
        finally:
            if self._is_open:  # `close` has done it, and the number may be another file's by now
                self._loop.remove_writer(descriptor)

    def _receive_all(self) -> None:
        try:
            while self._is_open:
                try:
                    message = protocol.receive(self._connection)
                except protocol.WithoutDescriptors as error:
                    self._silence.heard()
                    self._fail(error)
                    continue
                if message is None:
                    self.close()
                else:
                    self._silence.heard()
                    self._dispatch(message)
        except BlockingIOError:
            pass
        except (OSError, ValueError) as error:
            log.warning("%s: %s", self.name, error)
            self.close()

    def _fail(self, error: protocol.WithoutDescriptors) -> None:
        """Fail the one request whose reply has come without its descriptors."""
        log.warning("%s: a reply has lost its descriptors: %s", self.name, error)
        future = self._pending.get(error.body.get("id", -1))
        if future is not None and not future.done():
            future.set_exception(ResourceExhausted(f"{self.name}: {error}"))

    def _dispatch(self, message: Message) -> None:
        if "event" in message.body:
            protocol.close_all(message.fds)
            # What comes before is in the state that is asked for next.
            if self._answered.is_set() and not self._refusal:
                self._on_event(message.body)
            return
        try:
            number = protocol.checked_reply(message).body["id"]
        except ValueError:
            protocol.close_all(message.fds)
            raise
        if number == _HELLO:
            self._hear(message)
            return
        future = self._pending.get(number)
        if future is None or future.done():
            protocol.close_all(message.fds)
        else:
            future.set_result(message)

    def _died(self) -> None:
        self._receive_all()  # what it sent before its death
        self._loop.remove_reader(self._pidfd)
        _reap(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        self.lost.set()
        self.close()

    def close(self) -> None:
        """Disconnect; pending requests get Unavailable. The death of the process is still noticed."""
        if not self._is_open:
            return
        self._is_open = False
        self._answered.set()
        self._room.set()
        self._silence.close()
        if self._post_again is not None:
            self._post_again.cancel()
        self._loop.remove_reader(self._connection.fileno())
        self._loop.remove_writer(self._connection.fileno())
        self._connection.close()
        for future in self._pending.values():
            if not future.done():
                future.set_exception(self.unavailable())
        self._on_end()
        self.ended.set()

    async def kill(self) -> None:
        """Kill the process, and return when it is dead. Raises TimeoutError when it does not die."""
        if self._pidfd < 0:
            return
        # Its parent may have reaped it, and the news of that not have been read yet.
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        try:
            async with asyncio.timeout(_KILL_SECONDS):
                await self.lost.wait()
        except TimeoutError:
            why = waiting.explained(self.pid)
            raise TimeoutError(
                f"{self.name}: process {self.pid} does not die of SIGKILL: {why}"
            ) from None

    def forget(self) -> None:
        """Disconnect, and stop watching the process."""
        self.close()
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def unavailable(self) -> Unavailable:
        return Unavailable(f"{self.name}: {'died' if self.lost.is_set() else 'is disconnected'}")


class Absence(Channel):
    """Stands for the channel to a process that cannot be had, for good or until now: each request raises `error`."""

    def __init__(self, error: NodeAgentError) -> None:
        self.error = error
        self.pid = 0
        self.lost = asyncio.Event()
        self.ended = asyncio.Event()
        self._is_open = False
        self._pidfd = -1

    async def request(
        self, operation: str, fds: Sequence[tuple[str, int | None]] = (), **members: object
    ) -> Reply:
        raise type(self.error)(str(self.error))

    @property
    def silent(self) -> str:
        return str(self.error) if isinstance(self.error, Unavailable) else ""

    def post(self, operation: str, **members: object) -> None:
        """Nobody hears it."""


def _hello(number: int) -> Body:
    return {"id": number, "op": "hello", **protocol.spoken()}


def _reap(pidfd: int) -> None:
    """Reap the process if it is a child: only a launcher that this very agent has started is one."""
    try:
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        pass
