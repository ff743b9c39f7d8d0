"""The files that hide lower layers in an overlay mount: whiteouts, which are devices 0:0, and opaque directories."""

import os
import stat

OPAQUE_XATTR = "trusted.overlay.opaque"

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def is_whiteout(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def make_whiteout(directory: int, name: str) -> None:
    os.mknod(name, stat.S_IFCHR, 0, dir_fd=directory)


def make_opaque(directory: int, name: str) -> None:
    descriptor = os.open(name, _DIRECTORY, dir_fd=directory)
    try:
        os.setxattr(descriptor, OPAQUE_XATTR, b"y")
    finally:
        os.close(descriptor)


def is_opaque(descriptor: int) -> bool:
    """Whether a directory is opaque. The descriptor may be of any file, and an O_PATH one."""
    if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
        return False
    return OPAQUE_XATTR in os.listxattr(f"/proc/self/fd/{descriptor}")
