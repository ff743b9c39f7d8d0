"""A readable description of a compiled filter: what it does with each system call of this machine's architecture.

It is derived from the program that the kernel runs, whatever profiles that was made from.
"""

import functools

from nodeagent.linux import bpf_classic, libseccomp, seccomp
from nodeagent.sandbox.seccomp import defaults

BY_ARGUMENT = "by argument"

_ACTIONS = {
    libseccomp.ACT_KILL_PROCESS: "SCMP_ACT_KILL_PROCESS",
    libseccomp.ACT_KILL_THREAD: "SCMP_ACT_KILL_THREAD",
    libseccomp.ACT_TRAP: "SCMP_ACT_TRAP",
    libseccomp.ACT_ERRNO: "SCMP_ACT_ERRNO",
    libseccomp.ACT_TRACE: "SCMP_ACT_TRACE",
    libseccomp.ACT_LOG: "SCMP_ACT_LOG",
    libseccomp.ACT_ALLOW: "SCMP_ACT_ALLOW",
}
_NUMBERED = (libseccomp.ACT_ERRNO, libseccomp.ACT_TRACE)


@functools.lru_cache(64)
def describe(program: bytes) -> dict[str, list[str]]:
    """The names of system calls by the action on them, such as ``{"SCMP_ACT_ERRNO 1": ["mount"]}``.

    Calls whose action depends on their arguments are under BY_ARGUMENT. Empty for b"", which allows everything.
    """
    found: dict[str, list[str]] = {}
    for number, name in sorted(_names().items()) if program else ():
        outcomes = bpf_classic.outcomes(program, number, seccomp.AUDIT_ARCH)
        kind = _action(*outcomes) if len(outcomes) == 1 else BY_ARGUMENT
        found.setdefault(kind, []).append(name)
    return found


def _action(value: int) -> str:
    action, number = value & seccomp.RET_ACTION_FULL, value & ~seccomp.RET_ACTION_FULL
    name = _ACTIONS.get(action, f"{value:#x}")
    return f"{name} {number}" if action in _NUMBERED else name


@functools.cache
def _names() -> dict[int, str]:
    newest = {number: name for name, number in defaults.NUMBERS.items()}
    known = ((number, libseccomp.name_of(number)) for number in range(min(newest)))
    return {number: name for number, name in known if name} | newest
