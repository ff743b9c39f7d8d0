"""A hostile FUSE server, in a process of its own: what it has at a path changes from one look to the next (fuse(4))."""

import errno
import itertools
import os
import signal
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from nodeagent.linux import syscalls

_LOOKUP, _FORGET, _GETATTR, _READLINK, _OPEN, _READ = 1, 2, 3, 5, 14, 15
_RELEASE, _FLUSH, _INIT, _OPENDIR, _READDIR, _RELEASEDIR = 18, 25, 26, 27, 28, 29
_ACCESS, _INTERRUPT, _BATCH_FORGET = 34, 36, 42
_SILENT = (_FORGET, _BATCH_FORGET, _INTERRUPT)
MAX_REQUEST_BYTES = 1 << 17
_HEADER = struct.Struct("=IIQQIIII")

_INIT_ANSWER = struct.pack("=4I2H2I2H8I", 7, 31, 0, 0, 8, 6, 1 << 16, 1, *[0] * 10)
# The whole first answer of a server; its bytes 8 to 15 are those of the request.
HELLO = struct.pack("=IiQ", 16 + len(_INIT_ANSWER), 0, 0) + _INIT_ANSWER


class Node(NamedTuple):
    """link: where a symbolic link leads; endless: a file that can be read for ever, whatever size it says it has.

    silent: to read it is never answered.
    """

    mode: int
    link: str = ""
    size: int = 0
    endless: bool = False
    silent: bool = False


DIRECTORY = Node(stat.S_IFDIR | 0o777)


def link(target: str) -> Node:
    return Node(stat.S_IFLNK | 0o777, target)


@contextmanager
def serving(point: Path, names: Mapping[str, Sequence[Node]]) -> Iterator[None]:
    """names: what a name is in turns, in every directory; what is not there does not exist."""
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    data = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
    syscalls.mount("nodeagent-test", str(point), "fuse", 0, data)
    pid = os.fork()
    if pid == 0:
        try:
            syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
            _Server(device, names).run()
        finally:
            os._exit(1)
    os.close(device)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        syscalls.umount2(str(point), syscalls.MNT_DETACH)


class _Server:
    """Nothing is to be cached: each entry is valid for no time, so that the kernel asks again."""

    def __init__(self, device: int, names: Mapping[str, Sequence[Node]]) -> None:
        self._device = device
        self._turns = {name: itertools.cycle(nodes) for name, nodes in names.items()}
        self._nodes = [DIRECTORY, DIRECTORY]  # number 1 is the root
        self._numbers: dict[tuple[int, str, Node], int] = {}

    def run(self) -> None:
        while True:
            try:
                request = os.read(self._device, MAX_REQUEST_BYTES)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR):  # given up by whoever asked
                    continue
                raise
            _, opcode, unique, node, *_ = _HEADER.unpack_from(request)
            if opcode in _SILENT or (opcode == _READ and self._nodes[node].silent):
                continue
            code, answer = self._answer(opcode, node, request[_HEADER.size :])
            try:
                os.write(
                    self._device, struct.pack("=IiQ", 16 + len(answer), -code, unique) + answer
                )
            except FileNotFoundError:
                pass

    def _answer(self, opcode: int, number: int, body: bytes) -> tuple[int, bytes]:
        node = self._nodes[number]
        if opcode == _INIT:
            return 0, _INIT_ANSWER
        if opcode == _LOOKUP:
            return self._look_up(number, body.rstrip(b"\0").decode())
        if opcode == _GETATTR:
            return 0, struct.pack("=QII", 0, 0, 0) + _attributes(number, node)
        if opcode == _READLINK:
            return 0, node.link.encode()
        if opcode in (_OPEN, _OPENDIR):
            return 0, struct.pack("=QII", 0, 1, 0)  # FOPEN_DIRECT_IO
        if opcode == _READ:
            (size,) = struct.unpack_from("=I", body, 16)
            return 0, b"x" * size if node.endless else b""
        if opcode in (_READDIR, _RELEASEDIR, _RELEASE, _FLUSH, _ACCESS):
            return 0, b""
        return errno.ENOSYS, b""

    def _look_up(self, parent: int, name: str) -> tuple[int, bytes]:
        if name not in self._turns:
            return errno.ENOENT, b""
        node = next(self._turns[name])
        place = (parent, name, node)  # a directory may not be in itself
        if place not in self._numbers:
            self._numbers[place] = len(self._nodes)
            self._nodes.append(node)
        number = self._numbers[place]
        return 0, struct.pack("=4Q2I", number, 1, 0, 0, 0, 0) + _attributes(number, node)


def _attributes(number: int, node: Node) -> bytes:
    """struct fuse_attr."""
    size = node.size or len(node.link)
    return struct.pack("=6Q10I", number, size, 0, 0, 0, 0, 0, 0, 0, node.mode, 1, 0, 0, 0, 512, 0)
