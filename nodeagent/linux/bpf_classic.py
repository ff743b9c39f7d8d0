"""The part of classic BPF that seccomp filters use (linux/filter.h, linux/bpf_common.h): assembler and interpreter."""

import struct
from collections.abc import Callable, Sequence

# Load a word, return, jump, and jump if equal, greater, greater or equal, if any bit is set.
LOAD, RETURN, AND, JUMP = 0x20, 0x06, 0x54, 0x05
JUMP_EQUAL, JUMP_GREATER, JUMP_AT_LEAST, JUMP_ANY_BIT = 0x15, 0x25, 0x35, 0x45

# Offsets in struct seccomp_data (seccomp(2)).
NUMBER_OFFSET, ARCHITECTURE_OFFSET = 0, 4

_INSTRUCTION = struct.Struct("=HBBI")


def instruction(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """A struct sock_filter; if_true, if_false: how many instructions a conditional jump skips."""
    return _INSTRUCTION.pack(code, if_true, if_false, operand)


def joined(
    first: bytes, second: bytes, choose: Callable[[int, int], int], max_bytes: int
) -> bytes | None:
    """Join two programs into one that returns `choose` of their results; None where it would be too large.

    Each return of `first` becomes a jump to a copy of `second` whose returns are what is chosen of both; where that is
    the same for all of them, it stays a return. Nothing else is changed, so that jumps keep their distances.
    """
    own, others = _instructions(first), _instructions(second)
    returned = sorted({operand for code, _, _, operand in others if code == RETURN})
    copies: dict[tuple[int, ...], int] = {}
    appended: list[tuple[int, int, int, int]] = []
    for index, (code, if_true, if_false, operand) in enumerate(own):
        if code != RETURN:
            continue
        chosen = {other: choose(operand, other) for other in returned}
        values = tuple(chosen.values())
        if len(set(values)) == 1:
            own[index] = (code, if_true, if_false, values[0])
            continue
        if values not in copies:
            copies[values] = len(own) + len(appended)
            if (copies[values] + len(others)) * _INSTRUCTION.size > max_bytes:
                return None
            appended += [
                (kind, yes, no, chosen[k] if kind == RETURN else k) for kind, yes, no, k in others
            ]
        own[index] = (JUMP, 0, 0, copies[values] - index - 1)
    return b"".join(_INSTRUCTION.pack(*fields) for fields in (*own, *appended))


def seccomp_data(number: int, architecture: int, arguments: Sequence[int]) -> bytes:
    """The struct seccomp_data of a system call; architecture: AUDIT_ARCH_…; missing arguments are 0."""
    return struct.pack("=IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))


def _instructions(program: bytes) -> list[tuple[int, int, int, int]]:
    """The code, both jumps and the operand of each instruction."""
    return list(_INSTRUCTION.iter_unpack(program))


def run(program: bytes, data: bytes) -> int:
    """Run a filter. Raises ValueError for an instruction that no filter of libseccomp has."""
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


def outcomes(program: bytes, number: int, architecture: int) -> set[int]:
    """All results that a filter may have for a system call, whatever its arguments are.

    A state is the next instruction and the accumulator, which is None where it is a part of an argument.
    """
    known = {NUMBER_OFFSET: number, ARCHITECTURE_OFFSET: architecture}
    code = _instructions(program)
    found, seen = set(), set()
    pending: list[tuple[int, int | None]] = [(0, 0)]
    while pending:
        state = pending.pop()
        if state in seen:
            continue
        seen.add(state)
        counter, accumulator = state
        kind, if_true, if_false, operand = code[counter]
        if kind == RETURN:
            found.add(operand)
        elif kind == LOAD:
            pending.append((counter + 1, known.get(operand)))
        elif kind == AND:
            masked = None if accumulator is None else accumulator & operand
            pending.append((counter + 1, masked))
        elif kind == JUMP:
            pending.append((counter + 1 + operand, accumulator))
        else:
            ways = (True, False) if accumulator is None else (_holds(kind, accumulator, operand),)
            pending += [(counter + 1 + (if_true if way else if_false), accumulator) for way in ways]
    return found


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
