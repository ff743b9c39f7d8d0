"""What the service manager is told: what the agent does, and that its event loop turns.

sd_notify(3), sd_watchdog_enabled(3).
"""

import asyncio
import logging
import os
import socket

log = logging.getLogger(__name__)

WATCHDOG = "watchdog"

_PATIENCE_SECONDS = 1.0  # with a manager that does not read what others have told it


def notify(state: str) -> None:
    """Tell the service manager, if there is one. That it does not hear is no reason not to serve."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.settimeout(_PATIENCE_SECONDS)
            sock.sendto(state.encode(), address)
    except OSError as error:
        log.warning("the service manager does not hear %s: %s", state.partition("\n")[0], error)


def watchdog_seconds() -> float:
    """The time within which the service manager expects to hear from this process; 0 where it does not."""
    try:
        period_usec = int(os.environ.get("WATCHDOG_USEC", "0"))
        pid = int(os.environ.get("WATCHDOG_PID", os.getpid()))
    except ValueError:
        return 0.0
    return period_usec / 1e6 if pid == os.getpid() and period_usec > 0 else 0.0


async def feed_watchdog(period_s: float) -> None:
    """Tell that the loop turns, twice in each period. A loop that hangs does not, and the agent is restarted."""
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(period_s / 2)
