"""What a supervisor leaves with its launcher: who closes the last copy."""

import errno
import os
import socket
from pathlib import Path

import pytest

from nodeagent.sandbox import protocol
from nodeagent.sandbox.runtime import launcher_link
from nodeagent.sandbox.runtime.launcher_link import LauncherLink
from nodeagent.sandbox.runtime.loop import Loop


def is_open(descriptor: int) -> bool:
    return os.path.exists(f"/proc/self/fd/{descriptor}")


def run(loop: Loop) -> None:
    loop.call_after(20, loop.stop)
    loop.run()


@pytest.mark.parametrize("answers", [True, False], ids=["answers", "goes"])
def test_the_launcher_closes_first(tmp_path: Path, answers: bool) -> None:
    """Whoever closes last may have to wait for a container that holds the pipe's lock; the launcher serves all pods."""
    loop = Loop()
    launcher, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    link = LauncherLink(loop, "pod", str(tmp_path / "pods" / "pod"), ours)
    reader, writer = os.pipe()
    link.drop("main", None, [reader])
    message = protocol.receive(launcher)
    assert message is not None
    run(loop)
    before = (is_open(reader), link.is_closing)
    if answers:
        protocol.send(launcher, protocol.encode({"dropped": message.body["number"]}))
    else:
        launcher.close()
    run(loop)
    assert (before, (is_open(reader), link.is_closing)) == ((True, True), (False, False))
    if link._peer is not None:
        link._peer.close()
    os.close(writer)
    launcher.close()


def test_a_shortage_does_not_end_the_search_for_a_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without one, what a successor needs is kept by nobody."""
    monkeypatch.setattr(launcher_link, "_RETRY_MS", 1)
    loop = Loop()
    launcher, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    attempts: list[None] = []

    class Short(socket.socket):
        def __init__(self, *_: object) -> None:
            attempts.append(None)
            raise OSError(errno.EMFILE, "Too many open files")

    LauncherLink(loop, "pod", str(tmp_path / "pods" / "pod"), ours)
    monkeypatch.setattr(socket, "socket", Short)
    launcher.close()
    run(loop)
    assert len(attempts) > 1
