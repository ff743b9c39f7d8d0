"""The part of classic BPF that seccomp filters use (linux/filter.h, linux/bpf_common.h): made, and interpreted."""

import struct
from collections.abc import Sequence

# Load a word, return, jump, and jump if equal, greater, greater or equal, if any bit is set.
LOAD, RETURN, AND, JUMP = 0x20, 0x06, 0x54, 0x05
JUMP_EQUAL, JUMP_GREATER, JUMP_AT_LEAST, JUMP_ANY_BIT = 0x15, 0x25, 0x35, 0x45

# Of struct seccomp_data (seccomp(2)).
NUMBER_OFFSET, ARCHITECTURE_OFFSET = 0, 4

_INSTRUCTION = struct.Struct("=HBBI")


def instruction(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """struct sock_filter; if_true, if_false: how many instructions a conditional jump skips."""
    return _INSTRUCTION.pack(code, if_true, if_false, operand)


def seccomp_data(number: int, architecture: int, arguments: Sequence[int]) -> bytes:
    """struct seccomp_data of a system call; architecture: AUDIT_ARCH_…; arguments that are not given are 0."""
    return struct.pack("=IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))


def run(program: bytes, data: bytes) -> int:
    """What a filter returns. Raises ValueError for an instruction that no filter of libseccomp has."""
    accumulator = counter = 0
    while True:
        code, if_true, if_false, operand = _INSTRUCTION.unpack_from(
            program, counter * _INSTRUCTION.size
        )
        counter += 1
        if code == RETURN:
            return int(operand)
        if code == LOAD:
            (accumulator,) = struct.unpack_from("=I", data, operand)
        elif code == AND:
            accumulator &= operand
        elif code == JUMP:
            counter += operand
        else:
            counter += if_true if _holds(code, accumulator, operand) else if_false


def _holds(code: int, accumulator: int, operand: int) -> bool:
    if code == JUMP_EQUAL:
        return accumulator == operand
    if code == JUMP_GREATER:
        return accumulator > operand
    if code == JUMP_AT_LEAST:
        return accumulator >= operand
    if code == JUMP_ANY_BIT:
        return bool(accumulator & operand)
    raise ValueError(f"BPF instruction {code:#x}: not known")
