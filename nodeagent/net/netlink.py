"""Netlink messages: framing of messages and attributes, and a connection that checks every acknowledgement.

This is what rtnetlink(7) and nfnetlink share. The kernel handles a request inside the `send` that carries it, so its
answers are in the socket when `send` returns, and nothing here waits for them. Messages are packed with `struct`
because the start of each pod depends on their speed.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

# of netlink(7)
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_DUMP = 0x300
NLM_F_CREATE = 0x400
NLM_F_APPEND = 0x800

NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12

_NLA_F_NESTED = 0x8000
_NLA_TYPE_MASK = 0x3FFF
_NLMSGERR_ATTR_MSG = 1
_NLM_F_ACK_TLVS = 0x200
_SO_SNDBUFFORCE = 32
_SOL_NETLINK = 270
_NETLINK_CAP_ACK = 10
_NETLINK_EXT_ACK = 11

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_ERROR = struct.Struct("=i")
_RECEIVE_BYTES = 1 << 16
_SEND_BUFFER_BYTES = 1 << 22


# --- encoding -------------------------------------------------------------------------------------------------------


def attribute(kind: int, payload: bytes) -> bytes:
    size = _ATTRIBUTE.size + len(payload)
    return _ATTRIBUTE.pack(size, kind) + payload + bytes(-size % 4)


def nested(kind: int, *attributes: bytes) -> bytes:
    return attribute(kind | _NLA_F_NESTED, b"".join(attributes))


def text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def u8(kind: int, value: int) -> bytes:
    return attribute(kind, value.to_bytes(1, "little"))


def u16(kind: int, value: int) -> bytes:
    """An attribute of 16 bits in the machine's byte order, as rtnetlink has it."""
    return attribute(kind, struct.pack("=H", value))


def u32(kind: int, value: int) -> bytes:
    """An attribute of 32 bits in the machine's byte order, as rtnetlink has it."""
    return attribute(kind, struct.pack("=I", value))


def be32(kind: int, value: int) -> bytes:
    """An attribute of 32 bits in network byte order, as nfnetlink has it."""
    return attribute(kind, value.to_bytes(4, "big"))


@dataclass(frozen=True, slots=True)
class Request:
    """A request of type `kind`. `what` names the object and the operation, for the text of an error."""

    what: str
    kind: int
    flags: int
    body: bytes

    def pack(self, sequence: int, flags: int = 0) -> bytes:
        size = _HEADER.size + len(self.body)
        flags |= self.flags | NLM_F_REQUEST
        return _HEADER.pack(size, self.kind, flags, sequence, 0) + self.body + bytes(-size % 4)


# --- decoding -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Message:
    kind: int
    flags: int
    sequence: int
    body: bytes


def messages(data: bytes) -> Iterator[Message]:
    """The messages in one datagram. Raises `ValueError` where lengths do not fit."""
    offset = 0
    while offset < len(data):
        if len(data) - offset < _HEADER.size:
            raise ValueError(f"netlink: {len(data) - offset} bytes are no header")
        size, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
        if not _HEADER.size <= size <= len(data) - offset:
            raise ValueError(f"netlink: a message of {size} bytes in {len(data) - offset}")
        yield Message(kind, flags, sequence, data[offset + _HEADER.size : offset + size])
        offset += size + -size % 4


def attributes(data: bytes) -> dict[int, bytes]:
    """The payloads of attributes by type. Raises `ValueError` where lengths do not fit."""
    return dict(attribute_list(data))


def attribute_list(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes in their order, as types and payloads: a list has one type more than once. Raises `ValueError`."""
    offset = 0
    while len(data) - offset >= _ATTRIBUTE.size:
        size, kind = _ATTRIBUTE.unpack_from(data, offset)
        if not _ATTRIBUTE.size <= size <= len(data) - offset:
            raise ValueError(f"netlink: an attribute of {size} bytes in {len(data) - offset}")
        yield kind & _NLA_TYPE_MASK, data[offset + _ATTRIBUTE.size : offset + size]
        offset += size + -size % 4


def _refusal(message: Message) -> tuple[int, str]:
    """The error number of an NLMSG_ERROR, 0 for an acknowledgement, and the kernel's own text if it has one."""
    (code,) = _ERROR.unpack_from(message.body)
    words = b""
    if message.flags & _NLM_F_ACK_TLVS:
        # The header of the refused message comes first; NETLINK_CAP_ACK keeps its body away.
        extra = attributes(message.body[_ERROR.size + _HEADER.size :])
        words = extra.get(_NLMSGERR_ATTR_MSG, b"").rstrip(b"\0")
    return -code, words.decode(errors="replace")


# --- talking to the kernel ------------------------------------------------------------------------------------------


class Connection:
    """A netlink socket. It may come from another network namespace: its requests are about that one.

    A socket that was not made by `open` is for the caller to close.
    """

    def __init__(self, handed: socket.socket) -> None:
        self._socket = handed
        # netlink(7): texts in error messages, since Linux 4.12; no copy of the refused request in them, since 4.3.
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        self._sequences = itertools.count(int.from_bytes(os.urandom(2), "little") + 1)

    @classmethod
    def open(cls, protocol: int) -> Self:
        """Open a socket in the caller's namespace, with room for a long transaction."""
        own = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        try:
            # A batch is one datagram, which may be longer than net.core.wmem_max allows SO_SNDBUF to be (socket(7)).
            own.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SEND_BUFFER_BYTES)
            return cls(own)
        except BaseException:
            own.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def perform(self, *requests: Request) -> None:
        """Send all requests in one datagram; the kernel executes each, in order, even where one before it failed.

        Raises the `OSError` of the first that was refused.
        """
        waiting = {next(self._sequences): request for request in requests}
        self._send(request.pack(number, NLM_F_ACK) for number, request in waiting.items())
        failure: OSError | None = None
        while waiting:
            for message in self._receive(next(iter(waiting.values()))):
                request = waiting.pop(message.sequence, None)
                if request is not None and message.kind == NLMSG_ERROR:
                    failure = failure or _failure(message, request)
        if failure is not None:
            raise failure

    def ask(self, request: Request) -> bytes:
        """Send a request and return the body of the one message that answers."""
        number = next(self._sequences)
        self._send([request.pack(number)])
        while True:
            for message in self._receive(request):
                if message.sequence != number:
                    continue
                if message.kind == NLMSG_ERROR:
                    raise _failure(message, request) or _silence(request)
                return message.body

    def dump(self, request: Request) -> Iterator[bytes]:
        """Send a request and yield the bodies of all messages that answer; they must be read to the end."""
        number = next(self._sequences)
        self._send([request.pack(number, NLM_F_DUMP)])
        while True:
            for message in self._receive(request):
                if message.sequence != number:
                    continue
                if message.kind == NLMSG_ERROR:
                    raise _failure(message, request) or _silence(request)
                if message.kind == NLMSG_DONE:
                    return
                yield message.body

    def commit(self, begin: Request, requests: Sequence[Request], end: Request | None) -> None:
        """Send a batch of nfnetlink between its two framing messages: all of it takes effect, or nothing.

        Without `end` the kernel tries everything and undoes it. Raises the `OSError` of the first request that was
        refused.
        """
        framed = (begin, *requests) if end is None else (begin, *requests, end)
        batch = {next(self._sequences): request for request in framed}
        last = list(batch)[len(requests)]
        # Refusals are reported without NLM_F_ACK; the last acknowledgement shows that the batch was read to its end.
        self._send(
            request.pack(number, NLM_F_ACK if number == last else 0)
            for number, request in batch.items()
        )
        failure: OSError | None = None
        while last in batch:
            for message in self._receive(begin):
                request = batch.pop(message.sequence, None)
                if request is None or message.kind != NLMSG_ERROR:
                    continue
                failure = failure or _failure(message, request)
                if failure and request is begin:  # the batch as a whole: nothing more may follow
                    raise failure
        if failure is not None:
            raise failure

    def _send(self, packed: Iterable[bytes]) -> None:
        self._socket.sendto(b"".join(packed), (0, 0))

    def _receive(self, request: Request) -> Iterator[Message]:
        try:
            data, (sender, _) = self._socket.recvfrom(_RECEIVE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            raise _silence(request) from None
        # Privileged processes of the namespace can send to any netlink socket of it; 0 is the kernel.
        return messages(data) if sender == 0 else iter(())


def _failure(message: Message, request: Request) -> OSError | None:
    code, words = _refusal(message)
    if code == 0:
        return None
    reason = f"{os.strerror(code)} ({words})" if words else os.strerror(code)
    return OSError(code, reason, request.what)


def _silence(request: Request) -> OSError:
    return OSError(errno.EIO, "the kernel gave no answer", request.what)
