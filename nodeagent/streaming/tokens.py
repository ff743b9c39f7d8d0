"""One-time tickets: requests that an RPC has allowed, kept until a client connects to the streaming server."""

import secrets
import time
from collections.abc import Callable

from nodeagent.errors import ResourceExhausted
from nodeagent.streaming.backend import Request

LIFETIME_S = 60.0
MAX_TICKETS = 1000
TOKEN_BYTES = 16


class Tickets:
    """The requests by token, oldest first, each valid for one minute and one use."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tickets: dict[str, tuple[float, Request]] = {}

    def issue(self, request: Request) -> str:
        """A token for a request. Raises InvalidArgument for a malformed one, ResourceExhausted for too many."""
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
        """Return the request of a token and delete it; None where there is none for this path (any more)."""
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
