"""Installation of a compiled seccomp filter on the calling process (seccomp(2)).

`nodeagent.linux.libseccomp` makes one.
"""

import ctypes
import errno
import os
from collections.abc import Iterable

from nodeagent.linux import bpf_classic, syscalls

FLAG_TSYNC = 1 << 0
FLAG_LOG = 1 << 1
FLAG_SPEC_ALLOW = 1 << 2
FLAG_WAIT_KILLABLE_RECV = 1 << 5

RET_ACTION_FULL = 0xFFFF0000  # of what a filter returns; the rest is the action's number

_INSTRUCTION_BYTES = 8  # sizeof(struct sock_filter)
MAX_BYTES = 4096 * _INSTRUCTION_BYTES  # BPF_MAXINSNS


AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[os.uname().machine]  # linux/audit.h
_RET_ERRNO, _RET_ALLOW = 0x00050000, 0x7FFF0000


class _Program(ctypes.Structure):
    """The struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def allow_only(numbers: Iterable[int]) -> bytes:
    """A filter that refuses (EPERM) all system calls but these of this machine's own architecture."""
    refuse = bpf_classic.instruction(bpf_classic.RETURN, _RET_ERRNO | errno.EPERM)
    code = bpf_classic.instruction(bpf_classic.LOAD, bpf_classic.ARCHITECTURE_OFFSET)
    code += bpf_classic.instruction(bpf_classic.JUMP_EQUAL, AUDIT_ARCH, 1, 0) + refuse
    code += bpf_classic.instruction(bpf_classic.LOAD, bpf_classic.NUMBER_OFFSET)
    for number in numbers:
        code += bpf_classic.instruction(bpf_classic.JUMP_EQUAL, number, 0, 1)
        code += bpf_classic.instruction(bpf_classic.RETURN, _RET_ALLOW)
    return code + refuse


def install(program: bytes, flags: int) -> None:
    """Filter all further system calls; `program` is an array of struct sock_filter.

    Needs no_new_privs or SYS_ADMIN. Raises `ValueError` where `program` can't be one.
    """
    count, rest = divmod(len(program), _INSTRUCTION_BYTES)
    if rest or not 0 < len(program) <= MAX_BYTES:
        raise ValueError(f"seccomp filter of {len(program)} bytes: not 1 to 4096 instructions")
    argument = _Program(count, program)
    syscalls.seccomp(syscalls.SECCOMP_SET_MODE_FILTER, flags, ctypes.addressof(argument))
