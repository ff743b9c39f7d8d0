"""The time between clone3(2) and execve(2), as the supervisor sees it.

::

    preparing ─────── {"ready": …} ────────────────► ready ── go ──► executing ── end of file ──► over: executed
        │  └─ of a hidden process ─► succeeding ──────┘                  │
        │                                │    its successor is adopted   │
        └─ {"error": …}, or it dies ─────┴───────────────── a text ──────┴──────────────────────► over: failed

A process may be told to go before it is ready. One whose container has hooks that the supervisor runs says ``{"hooks":
true}`` while it prepares, and waits until it may proceed. `nodeagent.sandbox.init.main` is the other side.

A hidden process prepares itself where no container sees it, and its successor, which others may see and trace, executes
the program. So what the hidden process says until it is ready is believed, and nothing that is said later: what the
successor writes can only make the birth fail, and a write on the last pipe only makes the supervisor look for the
successor. Its pid the supervisor reads from the descriptor table of the hidden process, which waits until this has
happened. What a successor has open are the ends of pipes: whoever takes them can hold them open, so that their end
is not the only sign that the program is executed.
"""

import os
import signal
import socket
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple, Protocol

from nodeagent.errors import FailedPrecondition, NodeAgentError, StartError
from nodeagent.linux import processes
from nodeagent.sandbox import protocol
from nodeagent.sandbox.init import handshake
from nodeagent.sandbox.runtime import process
from nodeagent.sandbox.runtime.loop import Loop
from nodeagent.sandbox.spec import Identity

_LOOK_MS = 200


class Parent(Protocol):
    """The observer of a birth: `succeeded` and `ready` are called at most once, then exactly one of the others."""

    def succeeded(self, pid: int) -> None:
        """Take the process of this pid in place of the hidden one. Raises OSError where it is not ours."""

    def ready(self, identity: Identity, warnings: list[str], master: int | None) -> None:
        """Learn that the process is ready. master: of the terminal, which belongs to the parent from now on."""

    def executed(self) -> None: ...

    def failed(self, error: Exception) -> None: ...


class _Succession(NamedTuple):
    """The state between the announcement of a hidden process and its successor. hold: the pipe it waits at."""

    identity: Identity
    warnings: list[str]
    hold: int
    born: int
    master: int | None


class Birth:
    """One birth. status: the supervisor's end of the socket pair, which belongs to the birth, as all that comes by it.

    hidden: the pid of a hidden process, a child that is not reaped before the birth has been told (`listen`).
    """

    def __init__(self, loop: Loop, status: int, parent: Parent, hidden: int | None = None) -> None:
        self._loop = loop
        self._parent = parent
        self._hidden = hidden
        self._is_preparing = True
        self._succession: _Succession | None = None
        self._successor = 0
        self._text = self._go = status
        self._gone = False
        self._resumed = False
        self._over = False
        # How what the birth had open is closed, when it is over.
        self.give_up: Callable[[Collection[int]], None] = protocol.close_all
        # Called when the process waits for hooks, until `proceed`. None has it proceed at once: our own method would be
        # a cycle of references, and supervisors collect none.
        self.await_hooks: Callable[[], None] | None = None
        self._watch()

    @classmethod
    def resume(cls, loop: Loop, known: Mapping[str, int], parent: Parent, pid: int) -> "Birth":
        """Resume the birth of a process that reported "ready" to an earlier supervisor. known: its `descriptors`."""
        birth = cls(loop, known["status"], parent)
        birth._is_preparing = False
        if "go" in known:
            birth._go, birth._successor = known["go"], pid
            os.set_blocking(birth._go, False)
        return birth

    @property
    def descriptors(self) -> dict[str, int]:
        """The descriptors with which a later supervisor resumes the birth; they stay ours."""
        return {"status": self._text} | ({"go": self._go} if self._go != self._text else {})

    def go(self) -> None:
        """Let the program be executed as soon as the process is ready."""
        self._gone = True
        if self._hidden is None:
            self._say_go()

    def go_on(self) -> None:
        """Like go, for a successor that cannot tell whether its predecessor already sent the byte."""
        self._resumed = True
        self.go()

    def proceed(self) -> None:
        """Let a process go on that waits for hooks: they have been run."""
        if self._over:
            return
        try:
            os.write(self._text, handshake.PROCEED)
        except OSError:
            pass  # it has died, and the end of file says so

    def abandon(self, error: Exception) -> None:
        """End the birth as failed, whatever the process is doing."""
        self._finish(lambda: self._parent.failed(error))

    def listen(self) -> None:
        """Read the messages that are there already."""
        while not self._over and self._receive():
            pass

    def conclude(self) -> None:
        """Read what a dead process has left, and end its birth: others may hold the pipe of a successor open."""
        self.listen()
        if not self._over and self._successor and self._gone:
            self._finish(self._parent.executed)
        elif not self._over:
            self._finish(lambda: self._parent.failed(_died()))

    # ---- messages ----

    def _heard(self, _events: int) -> None:
        self._receive()

    def _receive(self) -> bool:
        """Take one message; False when there is none."""
        try:
            if self._is_preparing:
                self._hear_preparing(self._receive_message())
            else:
                self._hear_ready(os.read(self._text, handshake.MAX_TEXT_BYTES))
        except BlockingIOError:
            return False
        except ConnectionResetError:  # comes before what it said: it has ended without reading "go"
            self._gone = self._resumed  # or it has executed the program, having read the first "go"
        except (OSError, ValueError, LookupError) as error:
            self.abandon(NodeAgentError(f"init: {error}"))
        return True

    def _receive_message(self) -> protocol.Message | None:
        channel = socket.socket(fileno=self._text)
        try:
            return protocol.receive(channel)
        finally:
            channel.detach()

    def _hear_preparing(self, message: protocol.Message | None) -> None:
        """Handle a message of a process that no container can influence yet."""
        if message is None:
            self.abandon(_died())
        elif "ready" in message.body:
            self._announced(message)
        elif "hooks" in message.body:
            (self.await_hooks or self.proceed)()
        else:
            protocol.close_all(message.fds)
            self.abandon(protocol.read_error(message.body))

    def _announced(self, message: protocol.Message) -> None:
        ready, fds = message.body["ready"], message.fds
        pipes = [fds.pop(0) for _ in range(4)] if self._hidden is not None else []
        master = fds.pop(0) if fds else None
        self._is_preparing = False
        if self._hidden is None:
            self._parent.ready(ready["identity"], ready["warnings"], master)
            return
        go, hold, text, born = pipes
        self._loop.forget(self._text)
        os.close(self._text)
        self._text, self._go = text, go
        self._watch()
        self._succession = _Succession(ready["identity"], ready["warnings"], hold, born, master)
        for end in (go, born):
            os.set_blocking(end, False)
        self._loop.watch(born, self._look_for_successor)

    def _hear_ready(self, text: bytes) -> None:
        """Handle a text; it comes from a process that a container may trace, if it is a successor."""
        if text:
            self.abandon(StartError(text.decode(errors="replace")))
        elif self._succession is None and self._gone:
            self._finish(self._parent.executed)
        else:
            self.abandon(_died())

    # ---- succession ----

    def _look_for_successor(self, _events: int) -> None:
        """Look for the successor; what was written is not trusted, since anybody may have written it."""
        succession = self._succession
        if succession is None or self._hidden is None:
            return
        try:
            if not os.read(succession.born, handshake.MAX_TEXT_BYTES):
                self._loop.forget(succession.born)  # all have ended, which is told elsewhere
            pid = processes.pid_of_pidfd(self._hidden, handshake.SUCCESSOR_PIDFD)
            self._parent.succeeded(pid)
            os.kill(self._hidden, signal.SIGKILL)  # it lives: it has the pidfd open
        except (BlockingIOError, FileNotFoundError):
            return
        except (OSError, ValueError) as error:
            self.abandon(NodeAgentError(f"init: {error}"))
            return
        self._end_succession()
        self._hidden, self._successor = None, pid
        was_told_to_go = self._gone
        self._parent.ready(succession.identity, succession.warnings, succession.master)
        if was_told_to_go and not self._over:
            self._say_go()

    def _end_succession(self) -> None:
        """Close the pipe that the hidden process waits at, which lets it end."""
        if self._succession is not None:
            self._loop.forget(self._succession.born)
            protocol.close_all((self._succession.born, self._succession.hold))
            self._succession = None

    def _look_at_program(self) -> None:
        """Find out whether the program has been executed although a process holds the pipe open."""
        if self._over:
            return
        if process.is_of_ours(self._successor):
            self._loop.call_after(_LOOK_MS, self._look_at_program)
        else:
            self._finish(self._parent.executed)

    # ---- reports, and descriptors ----

    def _say_go(self) -> None:
        try:
            os.write(self._go, handshake.GO)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has died, and the end of file says so
        except BlockingIOError:
            pass  # a process has filled its pipe: there is something to read
        if self._successor:
            self._loop.call_after(_LOOK_MS, self._look_at_program)

    def _watch(self) -> None:
        os.set_blocking(self._text, False)
        self._loop.watch(self._text, self._heard)

    def _finish(self, tell: Callable[[], None]) -> None:
        self._over = True
        self._loop.forget(self._text)
        self.give_up({self._text, self._go})
        if self._succession is not None:
            protocol.close_all([fd for fd in (self._succession.master,) if fd is not None])
            self._end_succession()
        tell()


def _died() -> FailedPrecondition:
    """The error of a process that was killed from outside: with its container or pod, or for lack of memory."""
    return FailedPrecondition("init: was killed before it executed the program")
