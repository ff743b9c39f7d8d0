"""The time between clone3(2) and execve(2), as the supervisor sees it.

::

    preparing ─────── {"ready": …} ────────────────► ready ── go ──► executing ── end of file ──► over: executed
        │  └─ of a hidden process ─► succeeding ──────┘                  │
        │                                │    its successor is adopted   │
        └─ {"error": …}, or it dies ─────┴───────────────── a text ──────┴──────────────────────► over: failed

A process may be told to go before it is ready. `nodeagent.sandbox.init` is the other side.

A hidden process prepares itself where no container sees it, and its successor, which others may see and trace, executes
the program. So what the hidden process says until it is ready is believed, and nothing that is said later: what arrives
on the successor's socket can only make the birth fail, and what arrives on the old one is an occasion to look for the
successor, and nothing else. Who that is, the supervisor reads from the descriptor table of the hidden process, which
waits until this has happened.
"""

import os
import socket
from collections.abc import Callable
from typing import Any, Protocol

from nodeagent.errors import NodeAgentError, StartError
from nodeagent.sandbox import process, protocol
from nodeagent.sandbox.loop import Loop
from nodeagent.sandbox.spec import Identity

# The number under which a hidden process has the pidfd of its successor, and how it says that it is there. It has no
# descriptor of the successor's socket any more then, so that the end of that is the successor's.
SUCCESSOR = 5
BORN = b"b"

_GO = b"g"
_MAX_TEXT_BYTES = 4096


class Parent(Protocol):
    """Who is told about a birth: `succeeded` and `ready` at most once, then exactly one of the others."""

    def succeeded(self, pid: int) -> None:
        """The process of this pid goes on in place of the hidden one. Raises OSError where it is not ours."""

    def ready(self, identity: Identity, warnings: list[str], master: int | None) -> None:
        """master: of the terminal, which belongs to the parent from now on."""

    def executed(self) -> None: ...

    def failed(self, error: Exception) -> None: ...


class Birth:
    """One birth; `status` is the supervisor's end of the socket pair, and belongs to the birth.

    hidden: the pid of a hidden process, a child that is not reaped before the birth has been told (`listen`).
    """

    def __init__(
        self, loop: Loop, status: socket.socket, parent: Parent, hidden: int | None = None
    ) -> None:
        self._loop = loop
        self._status = status
        self._parent = parent
        self._hidden = hidden
        self._predecessor: socket.socket | None = None
        self._announced: dict[str, Any] | None = None
        self._master: int | None = None
        self._is_ready = False
        self._gone = False
        self._resumed = False
        self._over = False
        self._watch()

    @classmethod
    def resume(cls, loop: Loop, status: socket.socket, parent: Parent) -> "Birth":
        """That of a process that told a supervisor before us that it was ready."""
        birth = cls(loop, status, parent)
        birth._is_ready = True
        return birth

    @property
    def descriptor(self) -> int:
        return self._status.fileno()

    @property
    def is_over(self) -> bool:
        return self._over

    def go(self) -> None:
        """Let the program be executed as soon as the process is ready."""
        self._gone = True
        if self._hidden is None:
            self._say_go()

    def go_on(self) -> None:
        """As `go`, for who cannot know whether a supervisor before has said so already."""
        self._resumed = True
        self.go()

    def abandon(self, error: Exception) -> None:
        """Whatever it is doing, it has failed."""
        self._finish(lambda: self._parent.failed(error))

    def listen(self) -> None:
        """Read what has been said already."""
        while not self._over and self._receive():
            pass

    def conclude(self) -> None:
        """The process is dead: read what it has left."""
        self.listen()
        if not self._over:
            self._finish(lambda: self._parent.failed(_died()))

    # ---- what is heard ----

    def _heard(self, _events: int) -> None:
        self._receive()

    def _receive(self) -> bool:
        """Take one message; False when there is none."""
        try:
            if self._is_ready or self._announced is not None:
                self._hear_visible(self._status.recv(_MAX_TEXT_BYTES))
            else:
                self._hear_preparing(protocol.receive(self._status))
        except BlockingIOError:
            return False
        except ConnectionResetError:  # comes before what it said: it has ended without reading "go"
            self._gone = self._resumed  # or it has executed the program, having read the first "go"
        except (OSError, ValueError, LookupError) as error:
            self.abandon(NodeAgentError(f"init: {error}"))
        return True

    def _hear_preparing(self, message: protocol.Message | None) -> None:
        """From a process that nobody but us can make say anything."""
        if message is None:
            self.abandon(_died())
        elif "ready" in message.body:
            self._announced = message.body["ready"]
            successor = message.fds.pop(0) if self._hidden is not None else -1
            self._master = message.fds.pop(0) if message.fds else None
            if self._hidden is not None:
                self._switch(successor)
            else:
                self._tell_ready()
        else:
            protocol.close_all(message.fds)
            self.abandon(protocol.read_error(message.body))

    def _hear_visible(self, packet: bytes) -> None:
        """From a process that a container may trace. recv(2) has no room for descriptors, which are lost then."""
        if packet:
            self.abandon(StartError(packet.decode(errors="replace")))
        elif self._is_ready and self._gone:
            self._finish(self._parent.executed)
        else:
            self.abandon(_died())

    # ---- succession ----

    def _switch(self, status: int) -> None:
        """Hear the successor; the hidden process ends when we close its own socket."""
        self._loop.forget(self._status.fileno())
        self._predecessor, self._status = self._status, socket.socket(fileno=status)
        self._loop.watch(self._predecessor.fileno(), self._look_for_successor)
        self._watch()

    def _look_for_successor(self, _events: int) -> None:
        if self._predecessor is None or self._hidden is None:
            return
        try:
            if not self._predecessor.recv(_MAX_TEXT_BYTES):
                self._loop.forget(
                    self._predecessor.fileno()
                )  # it has ended, which is told elsewhere
            self._parent.succeeded(process.pid_of_pidfd(self._hidden, SUCCESSOR))
        except (BlockingIOError, FileNotFoundError):
            return
        except (OSError, ValueError) as error:
            self.abandon(NodeAgentError(f"init: {error}"))
            return
        self._leave_predecessor()
        self._hidden = None
        was_told_to_go = self._gone
        self._tell_ready()
        if was_told_to_go and not self._over:
            self._say_go()

    def _leave_predecessor(self) -> None:
        if self._predecessor is not None:
            self._loop.forget(self._predecessor.fileno())
            self._predecessor.close()
            self._predecessor = None

    # ---- what is told ----

    def _tell_ready(self) -> None:
        ready, self._announced = self._announced, None
        master, self._master = self._master, None
        self._is_ready = True
        if ready is not None:
            self._parent.ready(ready["identity"], ready["warnings"], master)

    def _say_go(self) -> None:
        try:
            self._status.send(_GO, socket.MSG_NOSIGNAL)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has died, and the end of file says so

    def _watch(self) -> None:
        self._status.setblocking(False)
        self._loop.watch(self._status.fileno(), self._heard)

    def _finish(self, tell: Callable[[], None]) -> None:
        self._over = True
        self._loop.forget(self._status.fileno())
        self._status.close()
        self._leave_predecessor()
        if self._master is not None:
            os.close(self._master)
            self._master = None
        tell()


def _died() -> NodeAgentError:
    return NodeAgentError("init: was killed before it executed the program")
