"""How much of a disk stays the node's: neither images nor what containers are made of may take it.

Standard library only: the init of a container asks too, when it copies an image's files into a volume.
"""

import os

from nodeagent.errors import ResourceExhausted

_RESERVE_BYTES = 512 << 20
_RESERVE_INODES = 64 << 10
_RESERVE_SHARE = 50  # a fiftieth of the file system, where that is less


def require_space(directory: os.PathLike[str] | int, size_bytes: int) -> None:
    """Raises ResourceExhausted when `size_bytes` more would not leave the node its reserve of bytes and inodes.

    directory: its path, or a descriptor of it.
    """
    disk = os.statvfs(directory)
    what = "" if isinstance(directory, int) else f"{directory}: "
    reserve = min(_RESERVE_BYTES, disk.f_blocks * disk.f_frsize // _RESERVE_SHARE)
    available = disk.f_bavail * disk.f_frsize
    if available - size_bytes < reserve:
        raise ResourceExhausted(
            f"{what}{available} bytes left on the disk, {size_bytes} needed and {reserve} kept"
        )
    # None are kept where there is no such bound (btrfs).
    inodes = min(_RESERVE_INODES, disk.f_files // _RESERVE_SHARE)
    if disk.f_favail < inodes:
        raise ResourceExhausted(
            f"{what}{disk.f_favail} inodes left on the disk, of which {inodes} are kept"
        )
