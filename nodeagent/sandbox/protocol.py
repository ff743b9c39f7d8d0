"""Messages between the agent, the launcher and the supervisors: JSON and descriptors over SOCK_SEQPACKET.

A request is ``{"id": n, "op": name, …}``, its reply ``{"id": n, "result": {…}}`` or ``{"id": n, "error": class,
"text": …}``, in any order. What comes unasked has no id: ``{"event": name, …}``. Descriptors travel in the same packet;
``"fds"`` names the purpose of each. A text that is longer than a packet should be travels in a memfd, which is then the
first descriptor of an otherwise empty packet. Everything is bounded; what is not in this grammar raises `ValueError`.

Versions. Launcher and supervisors survive an upgrade and a downgrade of the agent, so any two releases may meet, and
one reads what another has written.

* Both sides of a connection say in its first message which versions of the protocol they speak, from `oldest` to
  `version`: the agent by ``{"op": "hello", "version": …, "oldest": …}``, whose answer has the same members and is
  waited for before anything else is asked; a supervisor that goes to another launcher in ``attend``. The newest version
  that both speak is spoken. Without one each refuses the other with `IncompatibleVersion`: the pod goes on as it is,
  and can be stopped and removed; a launcher is replaced.
* A file of the state directory has the version of its own form (`nodeagent.sandbox.statefile`), and so has the
  database. A newer one is refused by name; neither it nor what it describes is touched. An older one is read.
* Whoever says no version, and a file that has none, is of a release before there were versions, which counts as 0.
* What others may pass over, or need not send, leaves a version as it is; anything else raises it. `OLDEST` is raised
  when code for an earlier version goes.
* The record of an end, the journal of a log and ``hello`` itself have no version: their forms stay.
"""

import array
import json
import os
import re
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, cast

from nodeagent import errors
from nodeagent.errors import IncompatibleVersion

VERSION = 1
OLDEST = 0

MAX_MESSAGE_BYTES = 4 << 20  # twice the arguments and environment that execve(2) takes
MAX_DESCRIPTORS = 64
MAX_ERROR_TEXT = 4096

# The kernel copies a packet into one piece of memory, and by default allows a socket 208 KiB.
_MAX_PACKET_BYTES = 32 << 10
_IN_MEMFD = b"\0"
_CUT = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)
_RIGHTS_BYTES = socket.CMSG_LEN((MAX_DESCRIPTORS + 1) * array.array("i").itemsize)

Body = dict[str, Any]
T = TypeVar("T")

_encode = json.JSONEncoder(separators=(",", ":")).encode
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


class Message(NamedTuple):
    """What was received; the descriptors belong to the receiver."""

    body: Body
    fds: list[int]


class WithoutDescriptors(ValueError):
    """A message whose descriptors the kernel dropped (MSG_CTRUNC): most often, the receiver can open no more files."""

    def __init__(self, body: Body) -> None:
        super().__init__("the receiver has no descriptors left, or a packet has too many")
        self.body = body


class Spoken(NamedTuple):
    """The versions of the protocol that a process speaks."""

    version: int
    oldest: int

    def __str__(self) -> str:
        return (
            str(self.version) if self.version == self.oldest else f"{self.oldest} to {self.version}"
        )


UNVERSIONED = Spoken(0, 0)


def spoken() -> Body:
    """What this process says of itself in ``hello``, its answer, and ``attend``."""
    return {"version": VERSION, "oldest": OLDEST}


def spoken_by(body: Body) -> Spoken:
    """What another process said of itself; raises ValueError for what cannot be."""
    version, oldest = body.get("version", 0), body.get("oldest", 0)
    if not (isinstance(version, int) and isinstance(oldest, int) and 0 <= oldest <= version):
        raise ValueError(f"versions {oldest!r:.20} to {version!r:.20} of the protocol")
    return Spoken(version, oldest)


def require_common_version(they: str, theirs: Spoken, we: str) -> None:
    """Raise IncompatibleVersion where two processes speak no version in common.

    they, we: the names of both, of which one says whose pod it is.
    """
    if theirs.version < OLDEST or theirs.oldest > VERSION:
        raise IncompatibleVersion(
            f"{they} speaks version {theirs} of the protocol, {we} {Spoken(VERSION, OLDEST)}; install a "
            "release of the agent that speaks both, or stop and remove the pod"
        )


def send(connection: socket.socket, packet: bytes, fds: Sequence[int] = ()) -> None:
    """Send what `encode` made. Raises BlockingIOError when a connection that does not block has no room."""
    if len(packet) <= _MAX_PACKET_BYTES:
        _send(connection, packet, fds)
        return
    memfd = os.memfd_create("message", os.MFD_CLOEXEC)
    try:
        os.write(memfd, packet)
        _send(connection, _IN_MEMFD, [memfd, *fds])
    finally:
        os.close(memfd)


def _send(connection: socket.socket, packet: bytes, fds: Sequence[int]) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    connection.sendmsg([packet], rights, socket.MSG_NOSIGNAL)


def encode(body: Body) -> bytes:
    """A message as a packet. Raises ResourceExhausted for one that is too long."""
    packet = to_json(body)
    if len(packet) > MAX_MESSAGE_BYTES:
        raise errors.ResourceExhausted(
            f"a plan of {len(packet)} bytes is longer than {MAX_MESSAGE_BYTES}"
        )
    return packet


def to_json(value: object) -> bytes:
    return _encode(value).encode("ascii")


def receive(connection: socket.socket) -> Message | None:
    """The next message, None at the end. Raises ValueError for one that is malformed, with nothing left open.

    One that has only lost descriptors on its way raises WithoutDescriptors.
    """
    packet, ancillary, flags, _ = connection.recvmsg(
        _MAX_PACKET_BYTES, _RIGHTS_BYTES, socket.MSG_CMSG_CLOEXEC
    )
    fds = _descriptors(ancillary)
    if not packet and not fds:
        return None
    try:
        if flags & socket.MSG_CTRUNC and not flags & socket.MSG_TRUNC and packet != _IN_MEMFD:
            raise WithoutDescriptors(decode(packet))
        if flags & _CUT:
            raise ValueError("a packet is too long or has too many descriptors")
        if packet == _IN_MEMFD and fds:
            packet = _take_memfd(fds.pop(0))
        return Message(decode(packet), fds)
    except BaseException:
        close_all(fds)
        raise


def _descriptors(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    """The kernel may cut the data in the middle of a descriptor's number, but then it has not opened that."""
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return fds.tolist()


def _take_memfd(memfd: int) -> bytes:
    try:
        packet = os.pread(memfd, MAX_MESSAGE_BYTES + 1, 0)
    finally:
        os.close(memfd)
    if len(packet) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message is longer than {MAX_MESSAGE_BYTES} bytes")
    return packet


def decode(packet: bytes) -> Body:
    """The JSON object in a packet. Raises ValueError for anything else."""
    try:
        body = json.loads(packet.decode())
    except RecursionError:
        raise ValueError("a message is nested too deeply") from None
    if not isinstance(body, dict):
        raise ValueError("a message is not an object")
    return body


def named(pairs: Iterable[tuple[str, int | None]]) -> tuple[list[str], list[int]]:
    """The names and the descriptors, for a message, of those that are there."""
    there = [(name, descriptor) for name, descriptor in pairs if descriptor is not None]
    return [name for name, _ in there], [descriptor for _, descriptor in there]


@contextmanager
def address(path: str) -> Iterator[str]:
    """`path` as an address of a socket, which has at most 108 bytes (unix(7)): through its directory."""
    directory, _, name = path.rpartition("/")
    descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{name}"
    finally:
        os.close(descriptor)


class Credentials(NamedTuple):
    """The ids of a peer (unix(7), SO_PEERCRED): of the process that listens, or that has connected."""

    pid: int
    uid: int
    gid: int


def peer_of(connection: socket.socket) -> Credentials:
    layout = struct.Struct("3i")
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size)
    return Credentials(*layout.unpack(data))


def close_all(fds: Iterable[int]) -> None:
    for descriptor in fds:
        os.close(descriptor)


def checked(kind: type[T], value: object) -> T:
    """`value` as one of the dictionaries of `nodeagent.sandbox.spec`, if it has all keys of it; raises ValueError."""
    keys = cast(Any, kind).__required_keys__
    missing = keys - value.keys() if isinstance(value, dict) else keys
    if missing:
        raise ValueError(f"{kind.__name__} lacks {', '.join(sorted(missing))}")
    return cast(T, value)


def checked_id(value: object) -> str:
    """An id that is good for the name of a directory; raises ValueError."""
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise ValueError(f"{value!r} is not an id")
    return value


# ---- errors ----


def describe_error(error: BaseException) -> Body:
    """An exception as the members of a reply that carries it."""
    if isinstance(error, OSError) and not isinstance(error, TimeoutError):
        filename = error.filename if isinstance(error.filename, str) else None
        text = error.strerror or str(error)
        text = text[:MAX_ERROR_TEXT]
        return {"error": "OSError", "text": text, "errno": error.errno, "path": filename}
    name = type(error).__name__
    known = isinstance(error, (errors.NodeAgentError, TimeoutError))
    return {
        "error": name if known else "NodeAgentError",
        "text": (str(error) if known else repr(error))[:MAX_ERROR_TEXT],
    }


def checked_reply(message: Message) -> Message:
    """`message`, if it is a result with the names of its descriptors, or an error; raises ValueError."""
    body, result = message.body, message.body.get("result")
    if not isinstance(body.get("id"), int):
        raise ValueError(f"a reply to no request: {body.get('text')!r:.200}")
    if "error" in body:
        if not isinstance(body["error"], str) or not isinstance(body.get("text"), str):
            raise ValueError("a reply with an error that has no name or no text")
        return message
    names = result.get("fds", []) if isinstance(result, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("a reply without a result")
    if len(names) != len(message.fds) or len(set(names)) != len(names):
        raise ValueError(f"a reply with {len(message.fds)} descriptors named {names}")
    return message


def read_error(body: Body) -> Exception:
    """The exception that `describe_error` described; a class that is unknown here becomes NodeAgentError."""
    name, text = body["error"], body["text"]
    if name == "OSError":
        number = body.get("errno")
        return OSError(number, text, body.get("path")) if isinstance(number, int) else OSError(text)
    if name == "TimeoutError":
        return TimeoutError(text)
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, errors.NodeAgentError):
        return kind(text)
    return errors.NodeAgentError(text)
