"""Compilation of seccomp profiles to the filters that a container's first process installs.

`runtime_default` is the profile of `nodeagent.sandbox.seccomp.defaults`; `from_file` and `from_json` take one in the
form of the OCI runtime specification. The same text and capabilities are compiled once.
"""

import errno
import functools
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from nodeagent import files
from nodeagent.errors import InvalidArgument, NotFound, Unsupported
from nodeagent.linux import bpf_classic, capabilities, libseccomp, seccomp
from nodeagent.linux.bpf_classic import (
    JUMP_AT_LEAST,
    JUMP_EQUAL,
    JUMP_GREATER,
    LOAD,
    NUMBER_OFFSET,
    RETURN,
    instruction,
)
from nodeagent.linux.libseccomp import Condition, Rule
from nodeagent.sandbox.seccomp import defaults, oci

_MAX_PROFILE_BYTES = 1 << 20
_CACHED = 64

# Errors of a path that does not lead to a file, or to one that is too large; all others are the node's trouble.
_FAULTS_OF_A_NAME = frozenset(
    (
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.EINVAL,
        errno.EFBIG,
        errno.ENXIO,  # a socket, or a device without a driver
        errno.ENODEV,
    )
)
_EPERM = libseccomp.ACT_ERRNO | errno.EPERM
_ENOSYS = libseccomp.ACT_ERRNO | errno.ENOSYS


class Filter(NamedTuple):
    """A compiled filter. program: an array of struct sock_filter; flags: of seccomp(2)."""

    program: bytes
    flags: int


@functools.lru_cache(_CACHED)
def runtime_default(held: int) -> Filter:
    """The default profile for processes with these capabilities (a mask: the bounding set)."""
    rules = list(_default_rules(set(capabilities.names(held))))
    newest = max(defaults.NUMBERS.values())
    return Filter(_compile(_EPERM, _compat_architectures(), rules, newest), seccomp.FLAG_SPEC_ALLOW)


def from_file(path: str, held: int) -> Filter:
    """The profile in the file `path`.

    Raises `NotFound`, `InvalidArgument` and `Unsupported`, which name it, and `OSError` for the node's trouble with it.
    """
    try:
        text = files.read_bounded(path, _MAX_PROFILE_BYTES)
    except FileNotFoundError:
        raise NotFound(f'seccomp profile "{path}": no such file') from None
    except OSError as error:
        if error.errno not in _FAULTS_OF_A_NAME:
            # Of a read, the error does not name the file.
            raise OSError(error.errno, error.strerror, path) from None
        raise InvalidArgument(f'seccomp profile "{path}": {error.strerror}') from None
    try:
        return from_json(text, held)
    except (InvalidArgument, Unsupported) as error:
        raise type(error)(f'seccomp profile "{path}": {error}') from error


@functools.lru_cache(_CACHED)
def from_json(text: bytes, held: int) -> Filter:
    """Compile a profile's text, for processes with these capabilities."""
    profile = oci.decode(text, set(capabilities.names(held)))
    newest = None if profile.is_permissive else _newest(profile.named)
    program = _compile(profile.default, profile.architectures, profile.rules, newest)
    return Filter(program, profile.flags)


@functools.lru_cache(_CACHED)
def intersection(base: Filter, profile: Filter) -> Filter:
    """A filter that allows only what both allow, argument by argument: of two actions, it takes the stricter one.

    It is one program, because a supervisor of an earlier version would ignore a second one in its plan. Where both
    refuse with an errno, it is that of the base. Which of both comes first changes nothing but the size.
    """
    first, second, limit = base.program, profile.program, seccomp.MAX_BYTES
    orders = (
        bpf_classic.joined(first, second, _stricter, limit),
        bpf_classic.joined(second, first, lambda own, other: _stricter(other, own), limit),
    )
    programs = [program for program in orders if program is not None]
    if not programs:
        raise InvalidArgument(f"filter, together with its base: larger than {limit} bytes")
    program = min(programs, key=len)
    either, both = base.flags | profile.flags, base.flags & profile.flags
    return Filter(program, either & seccomp.FLAG_LOG | both & seccomp.FLAG_SPEC_ALLOW)


def _stricter(base: int, profile: int) -> int:
    return base if _rank(base) <= _rank(profile) else profile


def _rank(value: int) -> int:
    """The order of actions, the strictest first: the kernel compares them as signed numbers (seccomp(2))."""
    action = value & seccomp.RET_ACTION_FULL
    return action - (1 << 32) if action == libseccomp.ACT_KILL_PROCESS else action


def _default_rules(held: set[str]) -> Iterator[Rule]:
    allow = libseccomp.ACT_ALLOW
    unconditional = set(defaults.ALLOWED)
    for capability, names in defaults.ALLOWED_WITH.items():
        if capability in held:
            unconditional.update(names)
    yield from (Rule(name, allow) for name in sorted(unconditional))
    yield from _masked("socket", defaults.SOCKET)
    yield from _masked("personality", defaults.PERSONALITY)
    yield from (Rule(name, _ENOSYS) for name in defaults.ABSENT)
    if "clone" not in unconditional:
        yield from _masked("clone", defaults.CLONE)
        yield Rule("clone3", _ENOSYS)


def _masked(name: str, alternatives: Iterable[defaults.Masked]) -> Iterator[Rule]:
    for argument, mask, value in alternatives:
        condition = Condition(argument, libseccomp.CMP_MASKED_EQ, mask, value)
        yield Rule(name, libseccomp.ACT_ALLOW, (condition,))


def _compat_architectures() -> list[str]:
    """The architecture of 32-bit programs on this machine."""
    return {"x86_64": ["x86"], "aarch64": ["arm"]}.get(os.uname().machine, [])


# ---- compilation ----

# Up to here the numbers of system calls differ between architectures; from here on they are the same.
_LAST_DIFFERENT = 423
# Above all numbers that the kernel gives out one after the other, and below those of ARM and x32.
_END_OF_NUMBERS = 1024


def _newest(names: Iterable[str]) -> int:
    """The newest of some system calls: the author of a profile cannot have known of newer ones."""
    numbers = (defaults.NUMBERS.get(name) or libseccomp.number_of(name) for name in names)
    shared = (n for n in numbers if n is not None and _LAST_DIFFERENT < n < _END_OF_NUMBERS)
    return max(shared, default=_LAST_DIFFERENT)


def _compile(
    default: int, architectures: list[str], rules: list[Rule], newest: int | None
) -> bytes:
    """Compile a filter with libseccomp, and a prologue of ours for system calls that the library may not know.

    newest: calls above it do not exist (ENOSYS); with None the default action holds there, too.
    """
    recent = [rule for rule in rules if rule.name in defaults.NUMBERS]
    if any(rule.conditions for rule in recent):
        raise InvalidArgument(f"conditions on {recent[0].name}: not supported")
    known = [rule for rule in rules if rule.name not in defaults.NUMBERS]
    program = _prologue(default, recent, newest) + libseccomp.compile_filter(
        default, architectures, known
    )
    if len(program) > seccomp.MAX_BYTES:
        raise InvalidArgument(f"filter of {len(program)} bytes: larger than {seccomp.MAX_BYTES}")
    return program


def _prologue(default: int, recent: list[Rule], newest: int | None) -> bytes:
    """Decide on the numbers of `defaults.NUMBERS` and above; leave all others to what follows."""
    decisions = b""
    for rule in recent:
        decisions += instruction(JUMP_EQUAL, defaults.NUMBERS[rule.name], 0, 1)
        decisions += instruction(RETURN, rule.action)
    if newest is not None:
        decisions += instruction(JUMP_GREATER, newest, 0, 1) + instruction(RETURN, _ENOSYS)
    first = min(defaults.NUMBERS.values())
    decisions += instruction(JUMP_AT_LEAST, first, 0, 1) + instruction(RETURN, default)
    length = len(decisions) // len(instruction(RETURN, 0))
    return (
        instruction(LOAD, NUMBER_OFFSET)
        + instruction(JUMP_GREATER, _LAST_DIFFERENT, 0, length + 1)
        + instruction(JUMP_AT_LEAST, _END_OF_NUMBERS, length, 0)
        + decisions
    )
