"""The server's end of HTTP/1.1, without IO: one request without a body, and its answer. h11 does the framing."""

from collections.abc import Iterable
from dataclasses import dataclass

import h11

MAX_HEAD_BYTES = 16 << 10

Headers = Iterable[tuple[str, str]]


class BadRequest(Exception):
    """The client sent something that this server can only answer with status 400."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request. Header names are in lower case; path is without the query."""

    method: str
    path: str
    headers: tuple[tuple[str, str], ...]

    def values(self, name: str) -> list[str]:
        """All values of a header that is a list, in order, whether on one line or on several."""
        lines = (value for key, value in self.headers if key == name)
        return [part.strip() for line in lines for part in line.split(",") if part.strip()]

    @property
    def upgrade(self) -> str:
        """The protocol that the client wants to switch to, in lower case; empty if none."""
        wanted = "upgrade" in (option.lower() for option in self.values("connection"))
        return next(iter(self.values("upgrade")), "").lower() if wanted else ""


class Exchange:
    """One request and one answer: `switch`, `answer` or `refuse`. A connection has no second request."""

    def __init__(self) -> None:
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._request: Request | None = None

    def receive_data(self, data: bytes) -> Request | None:
        """Take data in; return the request once it is complete. BadRequest: it cannot become one."""
        try:
            self._http.receive_data(data)
            return self._next()
        except h11.RemoteProtocolError as error:
            raise BadRequest(str(error)) from None

    def switch(self, headers: Headers) -> bytes:
        """The answer 101: what follows is not HTTP any more."""
        answer = h11.InformationalResponse(
            status_code=101, reason=b"Switching Protocols", headers=_encoded(headers)
        )
        return self._http.send(answer) or b""

    def answer(self, status: int, body: bytes, headers: Headers) -> bytes:
        """A complete answer, after which the connection is to be closed. The answer to a HEAD has no body."""
        fields = [
            *_encoded(headers),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        events: list[h11.Event] = [h11.Response(status_code=status, headers=fields)]
        if self._request is None or self._request.method != "HEAD":
            events.append(h11.Data(data=body))
        events.append(h11.EndOfMessage())
        return b"".join(self._http.send(event) or b"" for event in events)

    def refuse(self, status: int, text: str, headers: Headers = ()) -> bytes:
        """An answer with a plain text."""
        return self.answer(
            status, f"{text}\n".encode(), [*headers, ("Content-Type", "text/plain; charset=utf-8")]
        )

    @property
    def trailing(self) -> bytes:
        """The bytes behind the request, which belong to the protocol that follows."""
        return bytes(self._http.trailing_data[0])

    def _next(self) -> Request | None:
        while True:
            event = self._http.next_event()
            if isinstance(event, h11.Request):
                self._request = _request(event)
            elif isinstance(event, h11.EndOfMessage):
                return self._request
            elif isinstance(event, h11.Data):
                raise BadRequest("a body is not expected")
            else:
                return None


def _request(event: h11.Request) -> Request:
    return Request(
        event.method.decode("ascii"),
        event.target.decode("ascii").partition("?")[0],
        tuple((name.decode("ascii"), value.decode("latin-1")) for name, value in event.headers),
    )


def _encoded(headers: Headers) -> list[tuple[bytes, bytes]]:
    return [(name.encode("ascii"), value.encode("latin-1")) for name, value in headers]
