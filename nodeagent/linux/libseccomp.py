"""Compilation of seccomp filters with libseccomp (seccomp_rule_add(3), seccomp_export_bpf(3)).

Only the agent does this; a container's process installs the result with `nodeagent.linux.seccomp`. The library is
loaded with the first use: where it is missing, `OSError` says so and everything else works.
"""

import ctypes
import functools
import os
from collections.abc import Iterable
from ctypes import POINTER, c_char_p, c_int, c_uint, c_uint32, c_uint64, c_void_p
from typing import NamedTuple

_LIBRARY = "libseccomp.so.2"

ACT_KILL_PROCESS = 0x80000000
ACT_KILL_THREAD = 0x00000000
ACT_TRAP = 0x00030000
ACT_ERRNO = 0x00050000  # | errno
ACT_TRACE = 0x7FF00000  # | message for the tracer
ACT_LOG = 0x7FFC0000
ACT_ALLOW = 0x7FFF0000

# enum scmp_compare
CMP_NE = 1
CMP_LT = 2
CMP_LE = 3
CMP_EQ = 4
CMP_GE = 5
CMP_GT = 6
CMP_MASKED_EQ = 7

_ATTRIBUTE_OPTIMIZE = 8
_OPTIMIZE_BINARY_TREE = 2
_NATIVE = 0  # SCMP_ARCH_NATIVE
_NO_SYSCALL = -1  # __NR_SCMP_ERROR
_EEXIST = -17
_EDOM = -33


class Condition(NamedTuple):
    """A comparison of an argument; with CMP_MASKED_EQ, `value` is the mask and `other` the masked value."""

    argument: int
    compare: int
    value: int
    other: int = 0


class Rule(NamedTuple):
    """A rule to take `action` on the named system call when all conditions hold."""

    name: str
    action: int
    conditions: tuple[Condition, ...] = ()


class _Comparison(ctypes.Structure):
    """The struct scmp_arg_cmp."""

    _fields_ = (
        ("argument", c_uint),
        ("compare", c_int),
        ("value", c_uint64),
        ("other", c_uint64),
    )


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(_LIBRARY)
    library.seccomp_init.restype = c_void_p
    library.seccomp_init.argtypes = [c_uint32]
    library.seccomp_release.restype = None
    library.seccomp_release.argtypes = [c_void_p]
    library.seccomp_attr_set.argtypes = [c_void_p, c_int, c_uint32]
    library.seccomp_arch_add.argtypes = [c_void_p, c_uint32]
    library.seccomp_arch_resolve_name.restype = c_uint32
    library.seccomp_arch_resolve_name.argtypes = [c_char_p]
    library.seccomp_syscall_resolve_name.argtypes = [c_char_p]
    library.seccomp_syscall_resolve_num_arch.restype = c_void_p
    library.seccomp_syscall_resolve_num_arch.argtypes = [c_uint32, c_int]
    library.seccomp_rule_add_array.argtypes = [
        c_void_p,
        c_uint32,
        c_int,
        c_uint,
        POINTER(_Comparison),
    ]
    library.seccomp_export_bpf.argtypes = [c_void_p, c_int]
    return library


def _free(text: int) -> None:
    """Free what the library has allocated, with the C library's free(3)."""
    release = ctypes.CDLL(None).free
    release.restype, release.argtypes = None, [c_void_p]
    release(text)


def number_of(name: str) -> int | None:
    """The number of a system call on this machine; negative where only other architectures have it."""
    number: int = _library().seccomp_syscall_resolve_name(name.encode())
    return None if number == _NO_SYSCALL else number


def name_of(number: int) -> str:
    """The name of a system call of this machine by its number, "" where the library knows none."""
    text = _library().seccomp_syscall_resolve_num_arch(_NATIVE, number)
    if not text:
        return ""
    try:
        return (c_char_p(text).value or b"").decode()
    finally:
        _free(text)


def is_architecture(name: str) -> bool:
    """Whether the library knows an architecture by this name, as in "x86_64" or "aarch64"."""
    return bool(_library().seccomp_arch_resolve_name(name.encode()))


def compile_filter(default: int, architectures: Iterable[str], rules: Iterable[Rule]) -> bytes:
    """Compile an array of struct sock_filter for this machine's architecture and the given further ones.

    default: the action on system calls without a matching rule. Rules for unknown names are left out; those that ask
    for the default action have no effect.
    """
    library = _library()
    context = library.seccomp_init(default)
    if not context:
        raise ValueError(f"seccomp: default action {default:#x} is not known")
    try:
        # The tree makes the way to any rule short; libraries before 2.5 walk a list.
        library.seccomp_attr_set(context, _ATTRIBUTE_OPTIMIZE, _OPTIMIZE_BINARY_TREE)
        for name in architectures:
            _add_architecture(context, name)
        for rule in rules:
            _add_rule(context, rule, default)
        return _export(context)
    finally:
        library.seccomp_release(context)


def _add_architecture(context: int, name: str) -> None:
    token = _library().seccomp_arch_resolve_name(name.encode())
    code = _library().seccomp_arch_add(context, token)
    if code not in (0, _EEXIST):
        raise OSError(-code, f"seccomp: {os.strerror(-code)}", name)


def _add_rule(context: int, rule: Rule, default: int) -> None:
    number = number_of(rule.name)
    if number is None or rule.action == default:
        return
    comparisons = (_Comparison * len(rule.conditions))(*(_Comparison(*c) for c in rule.conditions))
    code = _library().seccomp_rule_add_array(
        context, rule.action, number, len(rule.conditions), comparisons
    )
    # the call does not exist on one of the architectures, or the rule is there already
    if code not in (0, _EDOM, _EEXIST):
        raise OSError(-code, f"seccomp rule: {os.strerror(-code)}", rule.name)


def _export(context: int) -> bytes:
    file = os.memfd_create("seccomp")
    try:
        code = _library().seccomp_export_bpf(context, file)
        if code:
            raise OSError(-code, f"seccomp filter: {os.strerror(-code)}")
        return os.pread(file, os.fstat(file).st_size, 0)
    finally:
        os.close(file)
