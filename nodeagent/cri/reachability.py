"""Whether clients still reach the CRI's sockets.

gRPC closes its acceptor for good at an accept(2) that fails for want of memory (ENOMEM, ENOBUFS), and a socket may be
removed by others. Connections that there are go on, so that the agent looks well, and no new one is ever served.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

log = logging.getLogger(__name__)

TASK = "CRI socket"
LOOK_SECONDS = 10.0
ANSWER_SECONDS = 5.0
MISSES = 2  # in a row: a busy machine may keep one from its answer


async def keep(paths: Sequence[Path], serve_anew: Callable[[], Awaitable[None]]) -> None:
    """Connect to each socket every now and then, and have them served anew when one does not answer."""
    misses = 0
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        lost = [path for path in paths if not await asyncio.to_thread(answers, path)]
        misses = misses + 1 if lost else 0
        if misses >= MISSES:
            misses = 0
            log.error("%s: accepts no connections any more; it is made anew", lost[0])
            await serve_anew()


def answers(path: Path) -> bool:
    """Whether a connection is accepted: the server speaks at once (RFC 9113, 3.4), or ends it for its own reason."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ANSWER_SECONDS)
            connection.connect(str(path))
            connection.recv(1)
    except (TimeoutError, ConnectionRefusedError, FileNotFoundError):
        return False
    except OSError as error:  # of ours: no descriptor is left, say
        log.debug("%s: %s", path, error)
    return True
