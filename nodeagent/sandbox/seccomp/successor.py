"""The system calls of a hidden process, and of its successor, between the filter and execve (`nodeagent.sandbox.init`).

A process whose filter does not allow all of them cannot be hidden. `forbidden` finds out by running the filter on them,
as the kernel would.
"""

import functools
import termios

from nodeagent.linux import bpf_classic, libseccomp, seccomp, syscalls

# The arguments are those that a filter may check; the others are tried as 0, and as what looks like a pointer.
CALLS: dict[str, tuple[int, ...]] = {
    "capset": (),
    "clone": (syscalls.CLONE_PARENT | syscalls.CLONE_PIDFD,),
    "close": (5,),
    "write": (6,),
    "read": (4,),
    "exit_group": (),
    "setsid": (),
    "ioctl": (0, termios.TIOCSCTTY),
    "execve": (),
}

_POINTER = 0x7F00_0000_1000
_ALLOWING = (libseccomp.ACT_ALLOW, libseccomp.ACT_LOG)


@functools.lru_cache(64)
def forbidden(program: bytes) -> tuple[str, ...]:
    """The names of `CALLS` that a filter (array of struct sock_filter) does not allow; b"" allows everything."""
    return tuple(name for name, arguments in CALLS.items() if not _allows(program, name, arguments))


def _allows(program: bytes, name: str, arguments: tuple[int, ...]) -> bool:
    number = libseccomp.number_of(name) if program else None
    if number is None:
        return True
    return all(
        bpf_classic.run(program, bpf_classic.seccomp_data(number, seccomp.AUDIT_ARCH, given))
        in _ALLOWING
        for given in (arguments, (*arguments, *[_POINTER] * (6 - len(arguments))))
    )
