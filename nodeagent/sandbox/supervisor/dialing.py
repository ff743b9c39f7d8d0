"""TCP connections to servers in the pod, made from inside its network namespace."""

import errno
import os
import socket
from collections.abc import Iterator

from nodeagent.errors import InvalidArgument, Unavailable
from nodeagent.sandbox.runtime.loop import WRITABLE, Loop
from nodeagent.sandbox.runtime.peers import Request

_ADDRESSES = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))


class Dialing:
    """One attempt, at each address in turn; the reply carries the connected socket."""

    def __init__(self, loop: Loop, port: int, request: Request) -> None:
        if not 0 < port < 65536:
            raise InvalidArgument(f"port {port}: out of range")
        self._loop = loop
        self._port = port
        self._request = request
        self._attempts = self._connections()

    def begin(self) -> None:
        self._next("no address of the pod")

    def _connections(self) -> Iterator[tuple[socket.socket, str]]:
        for family, host in _ADDRESSES:
            yield socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK), host

    def _next(self, reason: str) -> None:
        try:
            connection, host = next(self._attempts)
        except StopIteration:
            self._request.fail(Unavailable(f"dial port {self._port} in the pod: {reason}"))
            return
        except OSError as error:  # EAFNOSUPPORT: a kernel without IPv6
            self._next(f"{reason}; {error.strerror}")
            return
        code = connection.connect_ex((host, self._port))
        if code in (0, errno.EINPROGRESS):
            self._loop.watch(
                connection.fileno(), lambda _events: self._decide(connection), WRITABLE
            )
        else:
            connection.close()
            self._next(os.strerror(code))

    def _decide(self, connection: socket.socket) -> None:
        self._loop.forget(connection.fileno())
        code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code == 0:
            self._request.reply({"fds": ["connection"]}, [connection.fileno()])
        connection.close()
        if code:
            self._next(os.strerror(code))
