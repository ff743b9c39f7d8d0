"""Access of groups to device nodes: rules, and on v2 the BPF program that enforces them.

Rules only permit; what no rule names is refused. The agent's program is attached beside those of the groups above
(BPF_F_ALLOW_MULTI): an access needs the consent of all of them.
"""

import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from nodeagent.errors import InvalidArgument, Unsupported
from nodeagent.linux import bpf

_ACCESS_BITS = {"m": 1, "r": 2, "w": 4}  # BPF_DEVCG_ACC_*
_TYPES = {"b": 1, "c": 2}  # BPF_DEVCG_DEV_*


@dataclass(frozen=True, slots=True)
class Rule:
    """A permission: `access`, letters of "rwm" (read, write, mknod), to nodes of a type. None is any number."""

    type: Literal["b", "c"]
    major: int | None
    minor: int | None
    access: str

    def __post_init__(self) -> None:
        if self.type not in _TYPES or not self.access or set(self.access) - set("rwm"):
            raise InvalidArgument(f"device rule: {self.type} {self.access} is not b or c with rwm")

    def __str__(self) -> str:
        """The rule in the form of cgroup v1's devices.allow."""
        major = "*" if self.major is None else self.major
        minor = "*" if self.minor is None else self.minor
        return f"{self.type} {major}:{minor} {self.access}"


# Any node may be made (m), these may be used. /dev/console of a container is a pty (136), never the node's 5:1.
DEFAULT_RULES = (
    Rule("c", None, None, "m"),
    Rule("b", None, None, "m"),
    Rule("c", 1, 3, "rwm"),  # null
    Rule("c", 1, 5, "rwm"),  # zero
    Rule("c", 1, 7, "rwm"),  # full
    Rule("c", 1, 8, "rwm"),  # random
    Rule("c", 1, 9, "rwm"),  # urandom
    Rule("c", 5, 0, "rwm"),  # tty
    Rule("c", 5, 2, "rwm"),  # ptmx
    Rule("c", 136, None, "rwm"),  # pts/*
)


# --- the program ---------------------------------------------------------------------------------------------------
#
# Its context (struct bpf_cgroup_dev_ctx): 32 bits each of access << 16 | type, major, minor. It returns 1 for yes.

_R0, _R1, _TYPE, _ACCESS, _MAJOR, _MINOR, _SCRATCH = 0, 1, 2, 3, 4, 5, 6

_LDX_W = 0x61
_MOV_K, _MOV_X, _AND_K, _RSH_K = 0xB4, 0xBC, 0x54, 0x74
_JNE_K, _JNE_X = 0x56, 0x5E
_EXIT = 0x95


def program(rules: Sequence[Rule]) -> bytes:
    """The instructions (struct bpf_insn) that allow what one of `rules` allows."""
    code = b"".join(
        (
            _instruction(_LDX_W, _TYPE, _R1, 0, 0),
            _instruction(_MOV_X, _ACCESS, _TYPE),
            _instruction(_AND_K, _TYPE, 0, 0, 0xFFFF),
            _instruction(_RSH_K, _ACCESS, 0, 0, 16),
            _instruction(_LDX_W, _MAJOR, _R1, 4, 0),
            _instruction(_LDX_W, _MINOR, _R1, 8, 0),
        )
    )
    for rule in rules:
        code += _allow(rule)
    return code + _instruction(_MOV_K, _R0, 0, 0, 0) + _instruction(_EXIT)


def _allow(rule: Rule) -> bytes:
    """The instructions of one rule: return 1 if every test holds, else jump behind them."""
    tests = list(_tests(rule))
    length = sum(len(before) for before, *_ in tests) // 8 + len(tests)
    code, position = b"", 0
    for before, opcode, register, source, value in tests:
        position += len(before) // 8 + 1
        skip = length - position + 2
        code += before + _instruction(opcode, register, source, skip, value)
    return code + _instruction(_MOV_K, _R0, 0, 0, 1) + _instruction(_EXIT)


def _tests(rule: Rule) -> Iterator[tuple[bytes, int, int, int, int]]:
    """The tests of a rule: preparing instructions, and the jump away (opcode, register, source, value)."""
    yield b"", _JNE_K, _TYPE, 0, _TYPES[rule.type]
    access = sum(_ACCESS_BITS[letter] for letter in set(rule.access))
    if access != sum(_ACCESS_BITS.values()):
        wanted = _instruction(_MOV_X, _SCRATCH, _ACCESS) + _instruction(
            _AND_K, _SCRATCH, 0, 0, access
        )
        yield wanted, _JNE_X, _SCRATCH, _ACCESS, 0
    if rule.major is not None:
        yield b"", _JNE_K, _MAJOR, 0, rule.major
    if rule.minor is not None:
        yield b"", _JNE_K, _MINOR, 0, rule.minor


def _instruction(
    opcode: int, target: int = 0, source: int = 0, offset: int = 0, value: int = 0
) -> bytes:
    return struct.pack("<BBhi", opcode, source << 4 | target, offset, value)


def attach(cgroup: int, code: bytes | None) -> None:
    """Make `code` the only device program of the cgroup v2 directory `cgroup`; None detaches all programs.

    An existing program is replaced in one step, so that no access slips through in between.
    """
    attached = _attached(cgroup)
    try:
        if code is not None:
            _attach(cgroup, code, replace=attached[0] if attached else None)
        for program_fd in attached[1:] if code is not None else attached:
            bpf.prog_detach(cgroup, program_fd)
    finally:
        for program_fd in attached:
            os.close(program_fd)


def _attached(cgroup: int) -> list[int]:
    """Descriptors of the programs that are attached to the group."""
    try:
        return [bpf.prog_get_fd_by_id(number) for number in bpf.prog_query(cgroup)]
    except OSError as error:
        raise Unsupported(
            f"devices: this kernel has no BPF for cgroups: {error.strerror}"
        ) from error


def _attach(cgroup: int, code: bytes, replace: int | None) -> None:
    program_fd = bpf.prog_load(code)
    try:
        bpf.prog_attach(cgroup, program_fd, replace)
    finally:
        os.close(program_fd)
