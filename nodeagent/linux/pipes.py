"""tee(2), the call on pipes that Python lacks."""

import ctypes
import errno
import os

_SPLICE_F_NONBLOCK = 2
_NUMBER = {"x86_64": 276, "aarch64": 77}[os.uname().machine]

_syscall = ctypes.CDLL(None, use_errno=True)["syscall"]
_syscall.restype = ctypes.c_long
_syscall.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_uint)


def tee(source: int, target: int, length: int) -> int:
    """Show the pipe `target` what is in the pipe `source`, where it stays; returns the number of bytes, 0 at the end.

    Never blocks: raises BlockingIOError when there is nothing, or no room.
    """
    while True:
        result: int = _syscall(_NUMBER, source, target, length, _SPLICE_F_NONBLOCK)
        if result >= 0:
            return result
        code = ctypes.get_errno()
        if code != errno.EINTR:  # a signal came first, as SIGCHLD does (PEP 475)
            raise OSError(code, f"tee: {os.strerror(code)}")
