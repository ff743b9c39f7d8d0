"""What the service manager is told: what the agent does, and that its event loop turns.

sd_notify(3), sd_watchdog_enabled(3).
"""

import asyncio
import os
import socket

WATCHDOG = "watchdog"


def notify(state: str) -> None:
    """Tell the service manager, if there is one, and can hear it."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(1.0)  # of a manager that does not read
        sock.sendto(state.encode(), address)


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
