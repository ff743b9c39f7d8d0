"""Births as a supervisor sees them; the process is a test that holds the other end of the socket."""

import json
import socket

import pytest

from nodeagent.errors import NotFound
from nodeagent.sandbox.birth import Birth
from nodeagent.sandbox.loop import Loop
from nodeagent.sandbox.spec import Identity


class Parent:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.end: str | Exception = ""

    def ready(self, identity: Identity, warnings: list[str], master: int | None) -> None:
        pass

    def executed(self) -> None:
        self.end = "executed"

    def failed(self, error: Exception) -> None:
        self.end = error


@pytest.mark.parametrize("reads", [True, False])
def test_what_it_says_is_heard_whether_it_has_read_go_or_not(reads: bool) -> None:
    """Linux reports the unread "go" of a closed socket before the messages that are in it."""
    parent = Parent()
    ours, process = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    birth = Birth(Loop(), ours, parent)
    birth.go()
    process.send(json.dumps({"error": "NotFound", "text": "no such user"}).encode())
    if reads:
        process.recv(1)
    process.close()
    birth.conclude()
    assert isinstance(parent.end, NotFound)
    assert str(parent.end) == "no such user"


@pytest.mark.parametrize("reads", [True, False])
def test_only_who_has_read_go_can_have_executed(reads: bool) -> None:
    parent = Parent()
    ours, process = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    birth = Birth(Loop(), ours, parent)
    birth.go()
    if reads:
        process.recv(1)
    process.close()
    birth.listen()
    assert (parent.end == "executed") is reads


def test_who_has_read_one_go_of_two_can_have_executed() -> None:
    """A successor says it again: of a process that is gone, its end is known from elsewhere."""
    parent = Parent()
    ours, process = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.send(b"g")
    birth = Birth(Loop(), ours, parent)
    birth.go_on()
    process.recv(1)
    process.close()
    birth.listen()
    assert parent.end == "executed"
