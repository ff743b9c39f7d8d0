"""Seccomp profiles in the form of the OCI runtime specification (config-linux.md, "Seccomp").

The conditional parts of the profiles that engines distribute (``includes``, ``excludes``, ``archMap``) are understood
as well. Actions that notify a listener are not supported.
"""

import errno
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from nodeagent.errors import InvalidArgument, Unsupported
from nodeagent.linux import libseccomp, seccomp
from nodeagent.linux.libseccomp import Condition, Rule


class Profile(NamedTuple):
    """A profile in the terms of libseccomp.

    is_permissive: system calls without a rule are carried out. named: all system calls that the profile names.
    """

    default: int
    is_permissive: bool
    architectures: list[str]
    rules: list[Rule]
    named: set[str]
    flags: int


class _Argument(msgspec.Struct, rename="camel"):
    index: int
    value: int
    op: str
    value_two: int = 0


class _Scope(msgspec.Struct, rename="camel"):
    caps: list[str] = []
    arches: list[str] = []
    min_kernel: str = ""


class _Entry(msgspec.Struct, rename="camel"):
    action: str
    names: list[str] | None = None
    name: str = ""
    errno_ret: int | None = None
    args: list[_Argument] | None = None
    includes: _Scope | None = None
    excludes: _Scope | None = None


class _ArchMap(msgspec.Struct, rename="camel"):
    architecture: str
    sub_architectures: list[str] | None = None


class _Profile(msgspec.Struct, rename="camel"):
    default_action: str
    default_errno_ret: int | None = None
    architectures: list[str] | None = None
    arch_map: list[_ArchMap] | None = None
    flags: list[str] | None = None
    syscalls: list[_Entry] | None = None


_ACTIONS = {
    "SCMP_ACT_KILL": libseccomp.ACT_KILL_THREAD,
    "SCMP_ACT_KILL_THREAD": libseccomp.ACT_KILL_THREAD,
    "SCMP_ACT_KILL_PROCESS": libseccomp.ACT_KILL_PROCESS,
    "SCMP_ACT_TRAP": libseccomp.ACT_TRAP,
    "SCMP_ACT_ERRNO": libseccomp.ACT_ERRNO,
    "SCMP_ACT_TRACE": libseccomp.ACT_TRACE,
    "SCMP_ACT_LOG": libseccomp.ACT_LOG,
    "SCMP_ACT_ALLOW": libseccomp.ACT_ALLOW,
}
_NUMBERED = ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE")
_PERMISSIVE = ("SCMP_ACT_ALLOW", "SCMP_ACT_LOG", "SCMP_ACT_TRACE")
_COMPARISONS = {
    "SCMP_CMP_NE": libseccomp.CMP_NE,
    "SCMP_CMP_LT": libseccomp.CMP_LT,
    "SCMP_CMP_LE": libseccomp.CMP_LE,
    "SCMP_CMP_EQ": libseccomp.CMP_EQ,
    "SCMP_CMP_GE": libseccomp.CMP_GE,
    "SCMP_CMP_GT": libseccomp.CMP_GT,
    "SCMP_CMP_MASKED_EQ": libseccomp.CMP_MASKED_EQ,
}
_FLAGS = {
    "SECCOMP_FILTER_FLAG_TSYNC": seccomp.FLAG_TSYNC,
    "SECCOMP_FILTER_FLAG_LOG": seccomp.FLAG_LOG,
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW": seccomp.FLAG_SPEC_ALLOW,
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV": seccomp.FLAG_WAIT_KILLABLE_RECV,
}
# The names of machines in ``includes`` and ``excludes``, by uname(2)'s.
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}


_VERSION_PART = re.compile("[0-9]{1,9}")


def decode(text: bytes, held: set[str]) -> Profile:
    """Decode a profile for processes with the named capabilities. Raises `InvalidArgument` and `Unsupported`."""
    try:
        profile = msgspec.json.decode(text, type=_Profile)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidArgument(str(error)) from error
    entries = profile.syscalls or []
    return Profile(
        default=_action(profile.default_action, profile.default_errno_ret),
        is_permissive=profile.default_action in _PERMISSIVE,
        architectures=_architectures(profile),
        rules=[rule for entry in entries if _applies(entry, held) for rule in _rules(entry)],
        named={name for entry in entries for name in _names(entry)},
        flags=_flags(profile.flags),
    )


def _action(name: str, number: int | None) -> int:
    if name == "SCMP_ACT_NOTIFY":
        raise Unsupported(f"action {name}: not supported")
    action = _lookup(_ACTIONS, name, "action")
    if name not in _NUMBERED:
        return action
    number = errno.EPERM if number is None else number
    if not 0 <= number <= 0xFFFF:
        raise InvalidArgument(f"errnoRet {number}: out of range")
    return action | number


def _lookup(table: dict[str, int], name: str, kind: str) -> int:
    if name not in table:
        raise InvalidArgument(f"{kind} {name!r}: unknown")
    return table[name]


def _architectures(profile: _Profile) -> list[str]:
    """The architectures that the profile lists; with a map, also the ones that it has for this machine's."""
    names = list(profile.architectures or [])
    for entry in profile.arch_map or []:
        if _architecture(entry.architecture) == os.uname().machine:
            names += entry.sub_architectures or []
    return [_architecture(name) for name in names]


def _architecture(name: str) -> str:
    """``SCMP_ARCH_X86_64`` as the library calls it."""
    short = name.removeprefix("SCMP_ARCH_").lower()
    if not libseccomp.is_architecture(short):
        raise InvalidArgument(f"architecture {name!r}: unknown")
    return short


def _flags(names: list[str] | None) -> int:
    """The flags of seccomp(2). By default a filter brings no slow mitigation, as in the kernel from Linux 5.16 on."""
    if names is None:
        return seccomp.FLAG_SPEC_ALLOW
    flags = 0
    for name in names:
        flags |= _lookup(_FLAGS, name, "flag")
    return flags


def _applies(entry: _Entry, held: set[str]) -> bool:
    """Whether this machine and these capabilities are meant."""
    includes, excludes = entry.includes or _Scope(), entry.excludes or _Scope()
    machine = _MACHINES.get(os.uname().machine, "")
    return (
        _short(includes.caps) <= held
        and not _short(excludes.caps) & held
        and (not includes.arches or machine in includes.arches)
        and machine not in excludes.arches
        and (not includes.min_kernel or _kernel() >= _version(includes.min_kernel))
        and (not excludes.min_kernel or _kernel() < _version(excludes.min_kernel))
    )


def _short(capabilities: list[str]) -> set[str]:
    return {name.removeprefix("CAP_") for name in capabilities}


def _kernel() -> tuple[int, ...]:
    return _version(os.uname().release.partition("-")[0])


def _version(text: str) -> tuple[int, ...]:
    """Major and minor of a kernel's version."""
    parts = text.split(".")[:2]
    if not all(_VERSION_PART.fullmatch(part) for part in parts):
        raise InvalidArgument(f"minKernel {text!r}: not a version")
    return tuple(map(int, parts))


def _names(entry: _Entry) -> list[str]:
    return entry.names or ([entry.name] if entry.name else [])


def _rules(entry: _Entry) -> Iterator[Rule]:
    action = _action(entry.action, entry.errno_ret)
    conditions = tuple(_condition(argument) for argument in entry.args or [])
    # libseccomp takes one condition for each argument, all of which must hold. Where an argument has several, any of
    # the conditions suffices, as runc reads it.
    arguments = {condition.argument for condition in conditions}
    alternatives = [conditions] if len(arguments) == len(conditions) else [(c,) for c in conditions]
    for name in _names(entry):
        yield from (Rule(name, action, alternative) for alternative in alternatives)


def _condition(argument: _Argument) -> Condition:
    if not 0 <= argument.index <= 5:
        raise InvalidArgument(f"argument {argument.index}: a system call has arguments 0 to 5")
    for value in (argument.value, argument.value_two):
        if not 0 <= value < 2**64:
            raise InvalidArgument(f"value {value}: out of range")
    compare = _lookup(_COMPARISONS, argument.op, "comparison")
    return Condition(argument.index, compare, argument.value, argument.value_two)
