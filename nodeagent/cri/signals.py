"""The CRI's Signal enum and the kernel's numbers (signal(7); the same on x86-64 and arm64).

The C library keeps the first two real-time signals for itself, and SIGRTMIN means what it means to programs.
"""

import signal

from nodeagent.api import runtime_pb2 as pb

_PREFIX = "SIGNAL_"


def _number(name: str) -> int:
    """The number of ``SIGTERM``, ``SIGRTMINPLUS3`` or ``SIGRTMAXMINUS3``."""
    for base, sign in (("SIGRTMIN", 1), ("SIGRTMAX", -1)):
        if name.startswith(base):
            distance = name.removeprefix(base).removeprefix("PLUS").removeprefix("MINUS")
            return signal.Signals[base] + sign * int(distance or 0)
    return signal.Signals[name]


NUMBERS: dict[int, int] = {pb.SIGNAL_RUNTIME_DEFAULT: 0} | {
    value: _number(name.removeprefix(_PREFIX))
    for name, value in pb.Signal.items()
    if value != pb.SIGNAL_RUNTIME_DEFAULT
}

# Where several names have one number (SIGCHLD and SIGCLD), the first of the enum is reported.
_VALUES = {number: value for value, number in reversed(NUMBERS.items())}


def signal_value(number: int) -> int:
    """The enum value to report: RUNTIME_DEFAULT for a number that the CRI has no name for."""
    return _VALUES.get(number, pb.SIGNAL_RUNTIME_DEFAULT)
