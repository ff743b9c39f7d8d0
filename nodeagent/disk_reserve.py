"""The part of a disk that is reserved for the node: images, and the making of containers, may not take it.

Standard library only: the init of a container checks it too, when it copies an image's files into a volume.
"""

import os

from nodeagent.errors import ResourceExhausted

_RESERVE_BYTES = 512 << 20
_RESERVE_INODES = 64 << 10
_RESERVE_SHARE = 50  # a fiftieth of the file system, where that is less


def require_space(directory: os.PathLike[str] | int, size_bytes: int) -> None:
    """Raise ResourceExhausted where `size_bytes` more would not leave the node its reserve of bytes and inodes.

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
    # f_files is 0 on a file system without a fixed number of inodes (btrfs): none are reserved then.
    inodes = min(_RESERVE_INODES, disk.f_files // _RESERVE_SHARE)
    if disk.f_favail < inodes:
        raise ResourceExhausted(
            f"{what}{disk.f_favail} inodes left on the disk, of which {inodes} are kept"
        )
