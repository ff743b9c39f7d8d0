"""Resolution of registries' names, in threads that nothing else needs.

getaddrinfo(3) cannot be cancelled and takes as long as a name server lets it wait, which may be run by whoever names
an image. So no lookup is made by the event loop's own threads, which the whole agent shares, and no lookup waits for
another name's.
"""

import asyncio
import socket
import threading
from concurrent.futures import Future

from aiohttp.abc import AbstractResolver, ResolveResult

_MAX_LOOKUPS = 256
_NUMERIC = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV

_Address = tuple[socket.AddressFamily, int, str]  # family, protocol, literal


class Resolver(AbstractResolver):
    """A resolver with a thread for each lookup, which ends with it even if nothing waits for it any more."""

    def __init__(self) -> None:
        self._under_way: set[Future[list[_Address]]] = set()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        if len(self._under_way) >= _MAX_LOOKUPS:
            raise OSError(f"{_MAX_LOOKUPS} names of registries are being looked up already")
        future: Future[list[_Address]] = Future()
        future.set_running_or_notify_cancel()  # a caller that gives up does not end it
        self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)
        threading.Thread(target=_look_up, args=(host, port, family, future), daemon=True).start()
        return [
            ResolveResult(
                hostname=host,
                host=literal,
                port=port,
                family=found,
                proto=protocol,
                flags=_NUMERIC,
            )
            for found, protocol, literal in await asyncio.wrap_future(future)
        ]

    async def close(self) -> None:
        """Do nothing: lookups under way end by themselves."""


def _look_up(
    host: str, port: int, family: socket.AddressFamily, future: "Future[list[_Address]]"
) -> None:
    try:
        answers = socket.getaddrinfo(
            host, port, family, socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG
        )
    except (OSError, UnicodeError) as error:
        future.set_exception(error)
    else:
        future.set_result(
            [(found, protocol, _literal(address)) for found, _, protocol, _, address in answers]
        )


def _literal(address: tuple[object, ...]) -> str:
    """The address as text, with the zone that a link-local one needs."""
    scope = address[3] if len(address) == 4 else 0
    return f"{address[0]}%{scope}" if scope else str(address[0])
