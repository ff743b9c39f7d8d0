"""Capabilities: their names and numbers, and a process's sets as bit masks (capabilities(7)).

Bit n of a mask is capability n of ``linux/capability.h``. A name is written without ``CAP_``.
"""

import errno
import functools
from collections.abc import Iterable

from nodeagent.linux import syscalls

NAMES = (
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
)
SYS_ADMIN = 1 << NAMES.index("SYS_ADMIN")
SYS_PTRACE = 1 << NAMES.index("SYS_PTRACE")

_ALL_BITS = 2**64 - 1
_NUMBERS = {name: number for number, name in enumerate(NAMES)}


def mask(names: Iterable[str]) -> int:
    """The mask of names like "NET_RAW" or "CAP_NET_RAW", in any case; `ValueError` for an unknown one."""
    result = 0
    for name in names:
        number = _NUMBERS.get(name.upper().removeprefix("CAP_"))
        if number is None:
            raise ValueError(f"unknown capability {name!r}")
        result |= 1 << number
    return result


def names(capabilities: int) -> list[str]:
    """The names in a mask; a capability that is newer than the table is left out."""
    return [name for number, name in enumerate(NAMES) if capabilities >> number & 1]


@functools.cache
def last() -> int:
    """The highest capability that the running kernel knows."""
    number = 0
    while _is_known(number + 1):
        number += 1
    return number


def _is_known(number: int) -> bool:
    try:
        syscalls.prctl(syscalls.PR_CAPBSET_READ, number)
    except OSError:
        return False
    return True


def known() -> int:
    """All capabilities of the running kernel."""
    return (1 << last() + 1) - 1


def drop_bounding(keep: int) -> None:
    """Drop from the caller's bounding set all that is not in `keep`; needs SETPCAP."""
    for number in _bits(~keep & _ALL_BITS):
        try:
            syscalls.prctl(syscalls.PR_CAPBSET_DROP, number)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return  # EINVAL (prctl(2)): this kernel knows neither this one nor those after it


def raise_ambient(capabilities: int) -> None:
    """Set the ambient set; all of it must be permitted and inheritable (capabilities(7), "Ambient")."""
    syscalls.prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_CLEAR_ALL)
    for number in _bits(capabilities):
        syscalls.prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_RAISE, number)


def _bits(mask: int) -> list[int]:
    return [number for number in range(_ALL_BITS.bit_length()) if mask >> number & 1]
