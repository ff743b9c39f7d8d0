"""One-time tickets: what an RPC has allowed, until a client comes to the streaming server and takes it."""

import secrets
import time
from collections.abc import Callable

from nodeagent.errors import ResourceExhausted
from nodeagent.streaming.backend import Request

LIFETIME_S = 60.0
MAX_TICKETS = 1000
TOKEN_BYTES = 16


class Tickets:
    """Requests by token, oldest first, each for one minute and one use."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tickets: dict[str, tuple[float, Request]] = {}

    def issue(self, request: Request) -> str:
        """A token for a request. InvalidArgument: malformed; ResourceExhausted: too many are not taken yet."""
        request.check()
        self._expire()
        if len(self._tickets) >= MAX_TICKETS:
            raise ResourceExhausted(
                f"streaming: {MAX_TICKETS} sessions are waiting for their clients; try again in a minute"
            )
        token = secrets.token_urlsafe(TOKEN_BYTES)
        self._tickets[token] = (self._clock() + LIFETIME_S, request)
        return token

    def redeem(self, path: str, token: str) -> Request | None:
        """The request behind a token, which is spent by this; None if there is none of that path any more."""
        self._expire()
        _, request = self._tickets.pop(token, (0.0, None))
        return request if request is not None and request.path == path else None

    def _expire(self) -> None:
        now = self._clock()
        while self._tickets:
            token, (deadline, _) = next(iter(self._tickets.items()))
            if deadline > now:
                return
            del self._tickets[token]
