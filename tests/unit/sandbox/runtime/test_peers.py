"""Connections to a launcher or a supervisor."""

import errno
import os
import resource
import socket
import stat
from pathlib import Path

import pytest

from nodeagent.sandbox import protocol
from nodeagent.sandbox.runtime import peers
from nodeagent.sandbox.runtime.loop import Loop
from nodeagent.sandbox.runtime.peers import Listener, Peer


def test_the_socket_is_its_owners(tmp_path: Path) -> None:
    path = tmp_path / "s"
    umask = os.umask(0)
    listener = Listener(Loop(), str(path), socket.socket.close)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    listener._socket.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is served")
def test_without_descriptors_the_loop_rests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "_PAUSE_MS", 1)
    loop = Loop()
    attempts = 0

    def accepted(connection: socket.socket) -> None:
        connection.close()
        loop.stop()

    def attempt_again() -> None:
        """Count a round in which the loop came to its timers; after 20 of them there are descriptors again."""
        nonlocal attempts
        attempts += 1
        if attempts == 20:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        else:
            loop.call_after(2, attempt_again)

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    listener = Listener(loop, str(tmp_path / "s"), accepted)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(str(tmp_path / "s"))
        last = os.open("/dev/null", os.O_RDONLY)
        resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1, limits[1]))
        attempt_again()
        loop.run()
        os.close(last)
    listener._socket.close()
    assert attempts >= 20
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path}/s: cannot accept connections: Too many open files"
    ]


@pytest.mark.parametrize("unread", [False, True])
def test_what_was_said_before_the_end_is_received(unread: bool) -> None:
    """Also where the answer to the first finds nobody, or an earlier one was not read (ECONNRESET)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    said: list[object] = []

    def received(peer: Peer, message: protocol.Message) -> None:
        said.append(message.body["number"])
        peer.send({"heard": message.body["number"]})

    peer = Peer(Loop(), ours, received, lambda _peer: said.append("end"))
    if unread:
        peer.send({"unread": True})
    for number in range(3):
        protocol.send(theirs, protocol.encode({"number": number}))
    theirs.close()
    peer.drain()
    assert said == [0, 1, 2, "end"]


@pytest.mark.parametrize(
    ("hello", "refused"),
    [
        (None, "version 0 "),
        ({"version": 4, "oldest": 4}, "version 4 "),
        ({"version": 9, "oldest": 9}, "version 9 "),
        ({"version": 9, "oldest": 5}, None),
        ({"version": 7, "oldest": 0}, None),
    ],
)
def test_an_agent_that_speaks_no_version_in_common_is_refused(
    monkeypatch: pytest.MonkeyPatch, hello: protocol.Body | None, refused: str | None
) -> None:
    """Whatever it asks. One that says none is of a release before there were versions."""
    monkeypatch.setattr(protocol, "VERSION", 8)
    monkeypatch.setattr(protocol, "OLDEST", 5)
    done: list[object] = []
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def ask(request: peers.Request) -> None:
        done.append(request.body["id"])
        request.reply()

    def received(peer: Peer, message: protocol.Message) -> None:
        peers.perform('supervisor of pod "abc"', {"ask": ask}, peer, message)

    peer = Peer(Loop(), ours, received, lambda _peer: None)
    if hello is not None:
        protocol.send(theirs, protocol.encode({"id": 0, "op": "hello", **hello}))
    protocol.send(theirs, protocol.encode({"id": 1, "op": "ask"}))
    theirs.shutdown(socket.SHUT_WR)
    peer.drain()
    if hello is not None:
        answer = protocol.receive(theirs)
        assert answer is not None
        assert answer.body == {"id": 0, "result": {"version": 8, "oldest": 5}}
    answer = protocol.receive(theirs)
    assert answer is not None
    theirs.close()
    assert bool(done) == (refused is None)
    if refused is not None:
        assert answer.body["error"] == "IncompatibleVersion"
        assert f"the agent speaks {refused}" in answer.body["text"]
        assert 'supervisor of pod "abc" 5 to 8; install' in answer.body["text"]


class Failing(socket.socket):
    """A connection whose messages cannot be sent, for an error that has nothing to do with the other side."""

    error = 0

    def sendmsg(self, *_: object) -> int:
        raise OSError(self.error, os.strerror(self.error))


@pytest.mark.parametrize(
    "error", [errno.ENOMEM, errno.ENOBUFS, errno.ETOOMANYREFS, errno.EMFILE], ids=os.strerror
)
def test_a_message_that_cannot_be_sent_ends_the_connection(error: int) -> None:
    """It may be the only news of a container's end: whoever would wait for it connects again, and asks."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection = Failing(fileno=ours.detach())
    connection.error = error
    ended: list[Peer] = []
    peer = Peer(Loop(), connection, lambda *_: None, ended.append)
    peer.send({"event": "exit"})
    assert ended == [peer]
    assert protocol.receive(theirs) is None
    theirs.close()


def test_a_message_that_cannot_be_kept_ends_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There is no room for it, and no descriptor for copies of those that go with it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ended: list[Peer] = []
    peer = Peer(Loop(), ours, lambda *_: None, ended.append)
    while not peer._waiting:
        peer.send({"event": "exit"})

    def dup(_descriptor: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "dup", dup)
    peer.send({"event": "exit"}, [0])
    assert ended == [peer]
    theirs.close()


def test_a_request_that_has_lost_its_descriptors_is_answered() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    peer = Peer(Loop(), ours, lambda _peer, _message: None, lambda _peer: None)
    with open(os.devnull) as given:
        protocol.send(theirs, protocol.encode({"id": 7, "op": "create"}), [given.fileno()])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        peer.drain()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    answer = protocol.receive(theirs)
    assert answer is not None
    assert (answer.body["id"], answer.body["error"]) == (7, "ResourceExhausted")
    peer.close()
    theirs.close()
