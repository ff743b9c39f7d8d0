"""The part of classic BPF that seccomp filters use, interpreted (linux/filter.h, linux/bpf_common.h)."""

import struct

X86_64 = 0xC000003E
I386 = 0x40000003
AARCH64 = 0xC00000B7
NATIVE = {"x86_64": X86_64, "aarch64": AARCH64}


def evaluate(program: bytes, number: int, *arguments: int, arch: int) -> int:
    """What a filter returns for a system call."""
    data = struct.pack("=IIQ6Q", number, arch, 0, *arguments, *[0] * (6 - len(arguments)))
    accumulator = counter = 0
    while True:
        code, if_true, if_false, operand = struct.unpack_from("=HBBI", program, counter * 8)
        counter += 1
        if code == 0x06:
            return int(operand)
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, operand)
        elif code == 0x54:
            accumulator &= operand
        elif code == 0x05:
            counter += operand
        else:
            holds = {
                0x15: accumulator == operand,
                0x25: accumulator > operand,
                0x35: accumulator >= operand,
                0x45: bool(accumulator & operand),
            }[code]
            counter += if_true if holds else if_false
