"""The order that makes redirected writes to procfs impossible (CVE-2019-16884, CVE-2025-52881).

What a container's first process and an exec write to procfs, they write before anything of the container is mounted or
entered. The kernel reports each of these system calls before it is made: seccomp_unotify(2).
"""

import ctypes
import fcntl
import os
import select
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from nodeagent.linux import syscalls
from nodeagent.sandbox import rootfs_defaults
from nodeagent.sandbox.init import main as init
from nodeagent.sandbox.spec import IdMap
from tests.kernel.sandbox.conftest import Plan
from tests.kernel.sandbox.containers import Process, exec_plan, process_plan, start, v1_hierarchies

_X86 = os.uname().machine == "x86_64"
_WRITES = (1, 18, 20) if _X86 else (64, 68, 66)  # write, pwrite64, writev
_ENTRIES = (165, 308, 429) if _X86 else (40, 268, 429)  # mount, setns, move_mount

_LIBC = ctypes.CDLL(None, use_errno=True)
_PIDFD_GETFD = 438  # on all architectures
_NEW_LISTENER = 8
_RET_ALLOW, _RET_USER_NOTIF = 0x7FFF0000, 0x7FC00000
_NOTIF_RECV, _NOTIF_SEND = 0xC0502100, 0xC0182101
_CONTINUE = 1


def report_calls() -> int:
    """Have the kernel ask the returned descriptor about each call that is of interest."""
    numbers = (*_WRITES, *_ENTRIES)
    program = struct.pack("=HBBI", 0x20, 0, 0, 0)  # the number of the call
    for index, number in enumerate(numbers):
        program += struct.pack("=HBBI", 0x15, len(numbers) - index, 0, number)
    program += struct.pack("=HBBI", 0x06, 0, 0, _RET_ALLOW)
    program += struct.pack("=HBBI", 0x06, 0, 0, _RET_USER_NOTIF)
    code = ctypes.create_string_buffer(program, len(program))
    filter_ = struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(code))
    held = ctypes.create_string_buffer(filter_, len(filter_))
    return syscalls.seccomp(syscalls.SECCOMP_SET_MODE_FILTER, _NEW_LISTENER, ctypes.addressof(held))


class Watch:
    """What a process, and whom it clones, does of interest, in order."""

    def __init__(self, listener: int) -> None:
        self.seen: list[str] = []
        self._listener = listener

    def follow(self) -> None:
        """Until nobody with the filter is left."""
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        while poll.poll()[0][1] & select.POLLIN:
            request = bytearray(80)
            with suppress(FileNotFoundError):  # was killed meanwhile
                fcntl.ioctl(self._listener, _NOTIF_RECV, request)
                number, pid, _, call = struct.unpack_from("=QIIi", request)
                self._note(pid, call, *struct.unpack_from("=Q", request, 32))
                fcntl.ioctl(
                    self._listener, _NOTIF_SEND, struct.pack("=QqiI", number, 0, 0, _CONTINUE)
                )

    def _note(self, pid: int, call: int, argument: int) -> None:
        if call not in _WRITES:
            self.seen.append("entered")
            return
        pidfd = os.pidfd_open(pid)
        file = pidfd_getfd(pidfd, argument)
        if syscalls.statfs_type(file) == syscalls.PROC_SUPER_MAGIC:
            self.seen.append(os.path.basename(os.readlink(f"/proc/{pid}/fd/{argument}")))
        os.close(file)
        os.close(pidfd)


def pidfd_getfd(pidfd: int, descriptor: int) -> int:
    """A duplicate of another process's descriptor (pidfd_getfd(2))."""
    copy = int(_LIBC.syscall(_PIDFD_GETFD, pidfd, descriptor, 0))
    if copy == -1:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    return copy


@contextmanager
def watched(run: Callable[[int], object], namespaces: int = 0) -> Iterator[Watch]:
    """The process that `run` becomes, with its status socket, has reported when this begins."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid, pidfd = syscalls.clone3(namespaces)
    if pid == 0:
        with suppress(BaseException):
            theirs.send(bytes([report_calls()]))
            theirs.recv(1)  # the init closes what it does not know
            run(theirs.fileno())
        os._exit(99)
    theirs.close()
    listener = pidfd_getfd(pidfd, ours.recv(1)[0])
    ours.send(b"!")
    watch = Watch(listener)
    thread = threading.Thread(target=watch.follow)
    thread.start()
    process = Process(pidfd, ours, os.open("/dev/null", os.O_RDONLY))
    try:
        assert "ready" in process.message, process.message
        yield watch
    finally:
        process.close()
        thread.join()
        os.close(listener)


def in_order(seen: list[str], *expected: str) -> None:
    """Those and no others are written before anything is entered, and nothing after."""
    assert "entered" in seen
    first = seen.index("entered")
    assert tuple(seen[:first]) == expected
    assert set(seen[first:]) == {"entered"}


def test_a_container_s_first_process(plan: Plan, tmp_path: Path) -> None:
    line = IdMap(inside=0, outside=100000, length=1000)
    volume = rootfs_defaults.bind(str(tmp_path), "/volume")
    volume["uid_map"] = volume["gid_map"] = [line]
    mounts = [*rootfs_defaults.default_mounts(False, v1_hierarchies()), volume]
    made = plan("true", mounts=mounts, process={"oom_score_adj": 777})
    namespaces = syscalls.CLONE_NEWNS | syscalls.CLONE_NEWPID
    with watched(lambda status: init.run(made, init.InitFds(status)), namespaces) as watch:
        pass
    in_order(watch.seen, "oom_score_adj", "uid_map", "gid_map")


@pytest.mark.parametrize("hidden", [False, True])
def test_an_exec(plan: Plan, hidden: bool) -> None:
    settings = process_plan(oom_score_adj=777)
    with start(plan("exec sleep 100")) as container:
        container.go()

        def execute(status: int) -> None:
            fds = init.ExecFds(status, container.pidfd, hidden=hidden)
            init.run_exec(exec_plan(["/bin/true"]), settings, fds)

        with watched(execute) as watch:
            pass
        end_others_than(container)
    in_order(watch.seen, "oom_score_adj")


def end_others_than(container: Process) -> None:
    """A hidden exec has left a successor, a child of ours: a PID namespace does not end before all in it are reaped."""
    info = Path(f"/proc/self/fdinfo/{container.pidfd}").read_text()
    lists = [path.read_text().split() for path in Path("/proc/self/task").glob("*/children")]
    for child in {int(pid) for pids in lists for pid in pids}:
        if f"Pid:\t{child}\n" not in info:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
