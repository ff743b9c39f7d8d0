"""Which processes become known children: those alone that are children, and nobody's yet."""

import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from nodeagent.linux import syscalls
from nodeagent.sandbox.runtime.children import Children
from nodeagent.sandbox.runtime.loop import Loop


@pytest.fixture
def children() -> Iterator[Children]:
    """This process is as before afterwards."""
    before = signal.getsignal(signal.SIGCHLD)
    yield Children(Loop())
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, before)
    syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 0)


def test_a_child_is_owned_once(children: Children) -> None:
    ends: list[str] = []
    process = subprocess.Popen(["/bin/sleep", "1000"])
    child = children.adopt_sibling(process.pid, lambda _code: ends.append("first"))
    with pytest.raises(FileExistsError):
        children.adopt_sibling(process.pid, lambda _code: ends.append("second"))
    signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
    os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOWAIT)
    children.reap()
    assert ends == ["first"]
    os.close(child.pidfd)
    process.wait()


@pytest.mark.parametrize("pid", [1, os.getpid()])
def test_who_is_no_child_is_not_owned(children: Children, pid: int) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ProcessLookupError):
        children.adopt_sibling(pid, lambda _code: None)
    assert os.listdir("/proc/self/fd") == before


def test_a_child_that_cannot_be_made_leaves_no_connection(
    children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise BlockingIOError

    monkeypatch.setattr(syscalls, "clone3", fail)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(BlockingIOError):
        children.spawn_connected(lambda _end: None, lambda _code: None, keep=())
    assert os.listdir("/proc/self/fd") == before
