"""Completion of an unpacked layer from the layers below it, so that it is right as a lower layer of an overlay.

A layer's archive may leave out directories that it has files in: in an overlay the uppermost directory's owner and mode
count, so they are copied from below. It may have hard links to files of a layer below: an overlay can't have those,
so the file is copied. And it may have whiteouts that hide nothing: they are removed, because a directory that only one
layer has shows them as names that cannot be opened.
"""

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nodeagent.errors import ResourceExhausted
from nodeagent.images.budget import Budget, is_full
from nodeagent.images.unpack.directories import DIRECTORY, open_existing, open_parent
from nodeagent.images.unpack.layers import NEW_FILE, Unpacked, malformed
from nodeagent.images.unpack.tar import shown
from nodeagent.images.unpack.whiteouts import is_opaque, is_whiteout

_ANYTHING = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_PIECE_BYTES = 4 << 20


def complete(directory: Path, layer: Unpacked, below: Sequence[Path], budget: Budget) -> None:
    """Complete implied directories and links, and remove whiteouts that hide nothing.

    below: the layers under it, uppermost first; none of them is changed.
    """
    if not (below and layer.implied) and not layer.links and not layer.whiteouts:
        return
    with _opened(directory) as root:
        try:
            for path in layer.implied:
                _inherit_directory(root, path, below)
            _make_links(root, layer, below, budget)
            for path in layer.whiteouts:
                layer.inodes -= _remove_idle_whiteout(root, path, below)
        except OSError as error:
            if is_full(error):
                raise ResourceExhausted(f"completing a layer: {error}") from None
            raise


@contextmanager
def find(path: str, layers: Sequence[Path]) -> Iterator[int | None]:
    """Open (O_PATH) what an overlay of these layers, uppermost first, shows at `path`; None for nothing.

    Links on the way are not followed: they hide what they replace.
    """
    found = None
    for layer in layers:
        with _opened(layer) as root:
            found, hides = _step_down(root, path)
        if found is not None or hides:
            break
    try:
        yield found
    finally:
        if found is not None:
            os.close(found)


def _step_down(root: int, path: str) -> tuple[int | None, bool]:
    """Open what one layer has at `path`; also whether that layer hides all layers below there."""
    current, opaque = os.dup(root), is_opaque(root)
    for name in path.split("/"):
        try:
            following = os.open(name, _ANYTHING, dir_fd=current)
        except FileNotFoundError:
            return None, opaque
        except NotADirectoryError:
            return None, True
        finally:
            os.close(current)
        current = following
        opaque = opaque or is_opaque(current)
    if is_whiteout(os.fstat(current)):
        os.close(current)
        return None, True
    return current, opaque


def _inherit_directory(root: int, path: str, below: Sequence[Path]) -> None:
    directory = open_existing(root, path)
    if directory is None:
        return  # replaced by a later entry
    try:
        with find(path, below) as source:
            if source is not None and stat.S_ISDIR(os.fstat(source).st_mode):
                _copy_attributes(source, directory)
    finally:
        os.close(directory)


def _remove_idle_whiteout(root: int, path: str, below: Sequence[Path]) -> bool:
    parent, _, name = path.rpartition("/")
    directory, opaque = _step_down(root, parent or ".")
    if directory is None:
        return False  # replaced by a later entry
    try:
        with find(path, () if opaque else below) as hidden:
            return hidden is None and _unlink_whiteout(directory, name)
    finally:
        os.close(directory)


def _unlink_whiteout(directory: int, name: str) -> bool:
    try:
        if not is_whiteout(os.stat(name, dir_fd=directory, follow_symlinks=False)):
            return False  # replaced by a later entry
    except (FileNotFoundError, NotADirectoryError):
        return False
    before = os.fstat(directory)
    os.unlink(name, dir_fd=directory)
    os.utime(".", ns=(before.st_atime_ns, before.st_mtime_ns), dir_fd=directory)
    return True


def _make_links(root: int, layer: Unpacked, below: Sequence[Path], budget: Budget) -> None:
    """Make hard links to files of lower layers: each is copied once, like link(2) in an overlay copies it up."""
    copies: dict[str, str] = {}
    for name, target in layer.links.items():
        parent, _, base = name.rpartition("/")
        with find(target, below) as source:
            if source is None or stat.S_ISDIR(os.fstat(source).st_mode):
                raise malformed(name, f'no file "{shown(target)}" to link to')
            directory = open_existing(root, parent)
            if directory is None:
                continue  # replaced by a later entry
            try:
                before = os.fstat(directory)
                if target in copies:
                    _link(root, copies[target], directory, base)
                else:
                    layer.used_bytes += _copy(source, directory, base, budget)
                    layer.inodes += 1
                    copies[target] = name
                os.utime(directory, ns=(before.st_atime_ns, before.st_mtime_ns))
            except FileExistsError:
                continue  # a later entry has the name
            finally:
                os.close(directory)


def _link(root: int, path: str, directory: int, name: str) -> None:
    source, source_name = open_parent(root, path)
    try:
        os.link(source_name, name, src_dir_fd=source, dst_dir_fd=directory, follow_symlinks=False)
    finally:
        os.close(source)


def _copy(source: int, directory: int, name: str, budget: Budget) -> int:
    """Copy a file and return the bytes it takes, which are checked before any is written. Raises `FileExistsError`."""
    status = os.fstat(source)
    taken = status.st_blocks * 512
    budget.require(taken)
    _copy_file(source, status, directory, name, budget)
    return taken


def _copy_file(
    source: int, status: os.stat_result, directory: int, name: str, budget: Budget
) -> None:
    if stat.S_ISREG(status.st_mode):
        _copy_regular(source, directory, name, budget)
        return
    if stat.S_ISLNK(status.st_mode):
        os.symlink(os.readlink("", dir_fd=source), name, dir_fd=directory)
    else:
        os.mknod(name, status.st_mode, status.st_rdev, dir_fd=directory)
    os.chown(name, status.st_uid, status.st_gid, dir_fd=directory, follow_symlinks=False)
    if not stat.S_ISLNK(status.st_mode):
        os.chmod(name, stat.S_IMODE(status.st_mode), dir_fd=directory)
    times = (status.st_atime_ns, status.st_mtime_ns)
    os.utime(name, ns=times, dir_fd=directory, follow_symlinks=False)


def _copy_regular(source: int, directory: int, name: str, budget: Budget) -> None:
    reading = os.open(f"/proc/self/fd/{source}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        writing = os.open(name, NEW_FILE, 0o600, dir_fd=directory)
        try:
            _copy_content(reading, writing, budget)
            _copy_attributes(source, writing)
        finally:
            os.close(writing)
    finally:
        os.close(reading)


def _copy_content(reading: int, writing: int, budget: Budget) -> None:
    """Copy data and leave holes: a file of 8 TiB may have 4 KiB of data."""
    os.ftruncate(writing, os.fstat(reading).st_size)
    end = 0
    while (start := _next_data(reading, end)) is not None:
        end = os.lseek(reading, start, os.SEEK_HOLE)
        for at in range(start, end, _PIECE_BYTES):
            size = min(_PIECE_BYTES, end - at)
            budget.add(size)
            _copy_range(reading, writing, at, size)


def _next_data(file: int, at: int) -> int | None:
    try:
        return os.lseek(file, at, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None  # ENXIO: only a hole up to the end (lseek(2))


def _copy_range(reading: int, writing: int, at: int, size: int) -> None:
    """Copy a range by copy_file_range(2), which shares blocks where the file system can (XFS, Btrfs)."""
    end = at + size
    while at < end:
        copied = os.copy_file_range(reading, writing, end - at, at, at)
        if not copied:
            raise OSError(errno.EIO, "a layer's file became shorter while it was copied")
        at += copied


def _copy_attributes(source: int, target: int) -> None:
    """Copy owner, mode, times, and extended attributes but overlay's own."""
    status, path = os.fstat(source), f"/proc/self/fd/{source}"
    # First: chown(2) clears set-id bits, and the kernel drops security.capability (capabilities(7)).
    os.fchown(target, status.st_uid, status.st_gid)
    os.fchmod(target, stat.S_IMODE(status.st_mode))
    for name in os.listxattr(path):
        if not name.startswith("trusted.overlay."):
            os.setxattr(target, name, os.getxattr(path, name))
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


@contextmanager
def _opened(directory: Path) -> Iterator[int]:
    descriptor = os.open(directory, DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
