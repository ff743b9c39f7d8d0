"""Births as a supervisor sees them; the process is a test that holds the other end of the socket."""

import array
import contextlib
import json
import os
import socket
import subprocess
from collections.abc import Iterator

import pytest

from nodeagent.errors import FailedPrecondition, NodeAgentError, NotFound, StartError
from nodeagent.sandbox.init import handshake
from nodeagent.sandbox.runtime.loop import Loop
from nodeagent.sandbox.spec import Identity
from nodeagent.sandbox.supervisor.birth import Birth

IDENTITY = {"uid": 0, "gid": 0, "groups": [], "home": "/"}
READY = json.dumps({"ready": {"identity": IDENTITY, "warnings": []}}).encode()


class Parent:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.end: str | Exception = ""
        self.was_ready = 0
        self.successors: list[int] = []

    def succeeded(self, pid: int) -> None:
        self.successors.append(pid)

    def ready(self, identity: Identity, warnings: list[str], master: int | None) -> None:
        self.was_ready += 1

    def executed(self) -> None:
        self.end = "executed"

    def failed(self, error: Exception) -> None:
        self.end = error


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


@pytest.mark.parametrize("reads", [True, False])
def test_what_it_says_is_heard_whether_it_has_read_go_or_not(reads: bool) -> None:
    """Linux reports the unread "go" of a closed socket before the messages that are in it."""
    parent = Parent()
    ours, process = pair()
    subject = Birth(Loop(), ours.detach(), parent)
    subject.go()
    process.send(json.dumps({"error": "NotFound", "text": "no such user"}).encode())
    if reads:
        process.recv(1)
    process.close()
    subject.conclude()
    assert isinstance(parent.end, NotFound)
    assert str(parent.end) == "no such user"


@pytest.mark.parametrize("reads", [True, False])
def test_only_who_has_read_go_can_have_executed(reads: bool) -> None:
    parent = Parent()
    ours, process = pair()
    subject = Birth(Loop(), ours.detach(), parent)
    subject.go()
    process.send(READY)
    if reads:
        process.recv(1)
    process.close()
    subject.listen()
    assert (parent.end == "executed") is reads


def test_who_was_never_ready_cannot_have_executed() -> None:
    parent = Parent()
    ours, process = pair()
    subject = Birth(Loop(), ours.detach(), parent)
    subject.go()
    process.recv(1)
    process.close()
    subject.listen()
    assert isinstance(parent.end, FailedPrecondition)


def test_who_has_read_one_go_of_two_can_have_executed() -> None:
    """A supervisor's successor says it again: of a process that is gone, its end is known from elsewhere."""
    parent = Parent()
    ours, process = pair()
    ours.send(b"g")
    subject = Birth.resume(Loop(), {"status": ours.detach()}, parent, os.getpid())
    subject.go_on()
    process.recv(1)
    process.close()
    subject.listen()
    assert parent.end == "executed"


# ---- with a hidden process ----


class Hidden:
    """A birth whose hidden process has said that it is ready; text and born are what a container may get hold of."""

    def __init__(self) -> None:
        self.parent = Parent()
        ours, self.process = pair()
        go, hold, text, born = (os.pipe() for _ in range(4))
        self.go, self.hold, self.text, self.born = go[0], hold[0], text[1], born[1]
        # It has no descriptor but the standard ones, until it has made its successor.
        self.child = subprocess.Popen(["/bin/sleep", "1000"])
        self.birth = Birth(Loop(), ours.detach(), self.parent, self.child.pid)
        self.birth.go()
        given = (go[1], hold[1], text[0], born[0])
        self.process.sendmsg([READY], [rights(*given)])
        for descriptor in given:
            os.close(descriptor)
        self.birth.listen()
        self.process.close()

    def close(self) -> None:
        if not self.birth._over:
            self.birth.abandon(NodeAgentError("the test is over"))
        for descriptor in (self.go, self.hold, self.text, self.born):
            os.close(descriptor)
        self.child.kill()
        self.child.wait()


def rights(*descriptors: int) -> tuple[int, int, array.array[int]]:
    return (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))


@pytest.fixture
def hidden() -> Iterator[Hidden]:
    hidden = Hidden()
    yield hidden
    hidden.close()


def test_a_successor_is_not_believed_to_be_there(hidden: Hidden) -> None:
    for _ in range(3):
        os.write(hidden.born, handshake.BORN)
        hidden.birth._look_for_successor(0)
    assert (hidden.parent.successors, hidden.parent.was_ready, hidden.parent.end) == ([], 0, "")
    assert not hidden.birth._over


@pytest.mark.parametrize(
    "forged",
    [
        READY,
        json.dumps({"successor": 1}).encode(),
        json.dumps({"error": "NotFound", "text": "x"}).encode(),
        b"\xff\xfe",
        b"{" * 4000,
    ],
)
def test_whatever_a_successor_says_only_fails_its_own_birth(hidden: Hidden, forged: bytes) -> None:
    os.write(hidden.text, forged)
    hidden.birth.listen()
    assert isinstance(hidden.parent.end, StartError)
    assert (hidden.parent.successors, hidden.parent.was_ready) == ([], 0)


def test_the_hidden_process_is_let_go_when_the_birth_fails(hidden: Hidden) -> None:
    hidden.birth.abandon(NodeAgentError("failed"))
    assert os.read(hidden.hold, 1) == b""
    assert os.read(hidden.go, 1) == b""


def test_a_pipe_that_somebody_has_filled_holds_nobody_up() -> None:
    """A successor's end of it can be opened for writing (proc(5), fd)."""
    parent = Parent()
    text, go = os.pipe(), os.pipe()
    thief = os.open(f"/proc/self/fd/{go[0]}", os.O_WRONLY | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(thief, bytes(4096))
    known = {"status": text[0], "go": go[1]}
    subject = Birth.resume(Loop(), known, parent, os.getpid())
    subject.go()
    subject.abandon(NodeAgentError("the test is over"))
    for descriptor in (text[1], go[0], thief):
        os.close(descriptor)


def test_a_hidden_process_that_brings_no_pipes() -> None:
    parent = Parent()
    ours, process = pair()
    hidden = Birth(Loop(), ours.detach(), parent, os.getpid())
    process.send(READY)
    hidden.listen()
    process.close()
    assert isinstance(parent.end, NodeAgentError)


def test_a_process_that_waits_for_hooks_proceeds_when_it_is_told() -> None:
    parent = Parent()
    ours, process = pair()
    subject = Birth(Loop(), ours.detach(), parent)
    asked: list[bool] = []
    subject.await_hooks = lambda: asked.append(True)
    process.send(json.dumps({"hooks": True}).encode())
    subject.listen()
    assert asked == [True]
    subject.proceed()
    assert process.recv(1) == b"p"
    process.send(READY)
    process.close()
    subject.conclude()
    assert parent.was_ready == 1
    subject.proceed()  # of one that is over
