"""The system call bpf(2), as far as programs of type BPF_PROG_TYPE_CGROUP_DEVICE need it.

One function per command, named as in the manual. A call that fails raises `OSError`. The kernel makes all descriptors
close-on-exec.
"""

import ctypes
import os
import platform
import struct

_SYS_BPF = {"x86_64": 321, "aarch64": 280}[platform.machine()]

_BPF_PROG_LOAD = 5
_BPF_PROG_ATTACH = 8
_BPF_PROG_DETACH = 9
_BPF_PROG_GET_FD_BY_ID = 13
_BPF_PROG_QUERY = 16

_BPF_PROG_TYPE_CGROUP_DEVICE = 15
_BPF_CGROUP_DEVICE = 6
_BPF_F_ALLOW_MULTI = 1 << 1
_BPF_F_REPLACE = 1 << 2

# The part of union bpf_attr that BPF_PROG_QUERY uses. Linux 6.17 to 7.1 write its last field, `revision`, whatever size
# the caller gives: they would overwrite what is behind a shorter buffer.
_QUERY_BYTES = 64

# BPF_CGROUP_MAX_PROGS of the kernel.
_MAX_PROGRAMS = 64

_libc = ctypes.CDLL(None, use_errno=True)


def _bpf(command: int, attributes: bytes) -> tuple[int, bytes]:
    """Call the kernel; return the result and the attributes as it left them."""
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result = _libc.syscall(_SYS_BPF, command, buffer, len(attributes))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), "bpf")
    return int(result), buffer.raw


def prog_load(code: bytes) -> int:
    """Load instructions (struct bpf_insn) as a device program and return its descriptor."""
    instructions = ctypes.create_string_buffer(code, len(code))
    license_text = ctypes.create_string_buffer(b"Apache-2.0")
    attributes = struct.pack(
        "=IIQQIIQII16s",
        _BPF_PROG_TYPE_CGROUP_DEVICE,
        len(code) // 8,
        ctypes.addressof(instructions),
        ctypes.addressof(license_text),
        0,  # log_level
        0,  # log_size
        0,  # log_buf
        0,  # kern_version
        0,  # prog_flags
        b"nodeagent_dev",
    )
    program, _ = _bpf(_BPF_PROG_LOAD, attributes)
    return program


def prog_attach(cgroup: int, program: int, replace: int | None = None) -> None:
    """Attach `program` to the cgroup directory, beside others or in place of the program `replace`."""
    flags = _BPF_F_ALLOW_MULTI | (0 if replace is None else _BPF_F_REPLACE)
    _bpf(
        _BPF_PROG_ATTACH,
        struct.pack("=IIIII", cgroup, program, _BPF_CGROUP_DEVICE, flags, replace or 0),
    )


def prog_detach(cgroup: int, program: int) -> None:
    _bpf(_BPF_PROG_DETACH, struct.pack("=IIII", cgroup, program, _BPF_CGROUP_DEVICE, 0))


def prog_query(cgroup: int) -> list[int]:
    """The ids of the device programs that are attached to the cgroup directory itself."""
    ids = (ctypes.c_uint32 * _MAX_PROGRAMS)()
    attributes = struct.pack(
        "=IIIIQII", cgroup, _BPF_CGROUP_DEVICE, 0, 0, ctypes.addressof(ids), _MAX_PROGRAMS, 0
    )
    _, answer = _bpf(_BPF_PROG_QUERY, attributes.ljust(_QUERY_BYTES, b"\0"))
    (count,) = struct.unpack_from("=I", answer, 24)
    return list(ids[:count])


def prog_get_fd_by_id(number: int) -> int:
    program, _ = _bpf(_BPF_PROG_GET_FD_BY_ID, struct.pack("=III", number, 0, 0))
    return program
