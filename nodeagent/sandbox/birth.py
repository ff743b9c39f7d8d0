"""The time between clone3(2) and execve(2), as the supervisor sees it.

::

    preparing ── {"ready": …} ──► ready ── go ──► executing ── end of file ──► over: executed
        └────────── {"error": …}, or the process dies ────────────────────────► over: failed

A process may be told to go before it is ready. One that is hidden answers "go" with ``{"successor": …}``: that is told
to go in its turn, and executes the program. `nodeagent.sandbox.init` is the other side.
"""

import socket
from collections.abc import Callable
from typing import Protocol

from nodeagent.errors import NodeAgentError
from nodeagent.sandbox import protocol
from nodeagent.sandbox.children import Child
from nodeagent.sandbox.loop import Loop
from nodeagent.sandbox.spec import Identity

_GO = b"g"


class Parent(Protocol):
    """Who is told about a birth: `ready` at most once, then exactly one of the others."""

    def ready(self, identity: Identity, warnings: list[str], master: int | None) -> None:
        """master: of the terminal, which belongs to the parent from now on."""

    def executed(self) -> None: ...

    def failed(self, error: Exception) -> None: ...


class Birth:
    """One birth; `status` is the supervisor's end of the socket pair, and belongs to the birth.

    succeeded: gets the successor of a hidden process, and its pidfd for good.
    """

    def __init__(
        self,
        loop: Loop,
        status: socket.socket,
        parent: Parent,
        succeeded: Callable[[Child], None] | None = None,
    ) -> None:
        self._loop = loop
        self._status = status
        self._parent = parent
        self._succeeded = succeeded
        self._gone = False
        self._resumed = False
        self._over = False
        status.setblocking(False)
        loop.watch(status.fileno(), self._ready)

    @property
    def descriptor(self) -> int:
        return self._status.fileno()

    @property
    def is_over(self) -> bool:
        return self._over

    def go(self) -> None:
        """Let the program be executed as soon as the process is ready."""
        self._gone = True
        try:
            self._status.send(_GO, socket.MSG_NOSIGNAL)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has died, and the end of file says so

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

    def _ready(self, _events: int) -> None:
        self._receive()

    def _receive(self) -> bool:
        """Take one message; False when there is none."""
        try:
            message = protocol.receive(self._status)
        except BlockingIOError:
            return False
        except ConnectionResetError:  # comes before what it said: it has ended without reading "go"
            self._gone = self._resumed  # or it has executed the program, having read the first "go"
            return True
        except (OSError, ValueError) as error:
            reason = NodeAgentError(f"init: {error}")
            self._finish(lambda: self._parent.failed(reason))
            return True
        self._handle(message)
        return True

    def _handle(self, message: protocol.Message | None) -> None:
        if message is None:
            done = self._parent.executed if self._gone else lambda: self._parent.failed(_died())
            self._finish(done)
        elif "ready" in message.body:
            ready = message.body["ready"]
            master = message.fds.pop(0) if message.fds else None
            self._parent.ready(ready["identity"], ready["warnings"], master)
        elif "successor" in message.body and self._succeeded is not None:
            pidfd, status = message.fds
            self._succeeded(Child(message.body["successor"], pidfd))
            self._switch(status)
            self.go()
        else:
            error = protocol.read_error(message.body)
            self._finish(lambda: self._parent.failed(error))
            protocol.close_all(message.fds)

    def _switch(self, status: int) -> None:
        """Listen to the successor alone."""
        self._loop.forget(self._status.fileno())
        self._status.close()
        self._status = socket.socket(fileno=status)
        self._status.setblocking(False)
        self._loop.watch(status, self._ready)

    def _finish(self, tell: Callable[[], None]) -> None:
        self._over = True
        self._loop.forget(self._status.fileno())
        self._status.close()
        tell()


def _died() -> NodeAgentError:
    return NodeAgentError("init: was killed before it executed the program")
