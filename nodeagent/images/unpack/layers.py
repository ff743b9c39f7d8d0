"""Unpacking of a layer into a directory of its own, as a lower layer of an overlay mount.

The archive is not trusted. Directories are looked up below the layer's own (`directories`), so that no link leads out;
the last component of a name is always made anew, never followed. Refused are "..", names that are too long, whiteouts
of "." and "..", and attributes that overlay mounts obey. Made as by other runtimes are set-id bits, device nodes, FIFOs
and absolute links (they are only ever followed inside a container).

Whiteouts (image-spec ``layer.md``) become overlay's: a character device 0:0, and ``trusted.overlay.opaque``.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from nodeagent import files
from nodeagent.errors import DataLoss, InvalidArgument, ResourceExhausted
from nodeagent.images.budget import Budget, bomb_limit, is_full
from nodeagent.images.content import BlobReader
from nodeagent.images.unpack import tar
from nodeagent.images.unpack.compression import decompressed
from nodeagent.images.unpack.directories import DIRECTORY, Directories, memory_of, open_parent
from nodeagent.images.unpack.whiteouts import make_opaque, make_whiteout

WHITEOUT = ".wh."
OPAQUE = ".wh..wh..opq"
_AUFS = ".wh..wh."  # names that aufs kept for itself; old images have them

_MAX_PATH = 4096
_MAX_POSTPONED_BYTES = 64 << 20
_DISK_BLOCK = 4096

NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NODES = {"char": stat.S_IFCHR, "block": stat.S_IFBLK, "fifo": stat.S_IFIFO}

# Labels of the machine that built the image are left out; what overlay itself would obey is refused.
_KEPT_XATTRS = ("user.", "security.capability", "system.posix_acl_")
_REFUSED_XATTRS = ("trusted.overlay.", "user.overlay.")

# These tell about the archive, not about the node.
_MALFORMED_ERRNOS = frozenset(
    (
        errno.ENAMETOOLONG,
        errno.ENOTDIR,
        errno.ELOOP,
        errno.EINVAL,
        errno.EPERM,
        errno.EMLINK,
        errno.EFBIG,
    )
)

T = TypeVar("T")


@dataclass(slots=True)
class Unpacked:
    """An unpacked layer, which `inheritance` completes from the layers below it.

    implied: directories that it has files in but does not describe; links: hard links, by name, to files that it does
    not have; whiteouts: those of which the layers below tell whether they hide something.
    opaque: it hides all layers below; an overlay mount does not look for that in the root of a layer.
    """

    used_bytes: int = 0
    inodes: int = 0
    opaque: bool = False
    implied: dict[str, None] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    whiteouts: dict[str, None] = field(default_factory=dict)


def unpack(source: BlobReader, directory: Path, diff_id: str, budget: Budget) -> Unpacked:
    """Unpack a layer's blob, which may still be arriving, into a new `directory`. Nothing is synced.

    Raises `DataLoss` for content with another diff ID, `InvalidArgument` or `Unsupported` for a bad layer, and
    `ResourceExhausted`.
    """
    directory.mkdir()
    directory.chmod(0o755)  # whatever the umask, where the layer does not describe its root
    root = os.open(directory, DIRECTORY)
    content = hashlib.sha256()
    try:
        with closing(_measured(source, content.update, budget)) as chunks:
            with closing(_Unpacker(root, budget)) as unpacker:
                for entry, pieces in tar.read(chunks):
                    unpacker.add(entry, pieces)
                unpacker.finish()
            for _ in chunks:  # what follows the archive's end mark belongs to the digest as well
                pass
    except OSError as error:
        if is_full(error):
            raise ResourceExhausted(f"unpacking {source.blob.digest}: {error}") from None
        raise
    finally:
        os.close(root)
    if f"sha256:{content.hexdigest()}" != diff_id:
        raise DataLoss(
            f"{source.blob.digest}: its content has the digest sha256:{content.hexdigest()}, "
            f"not {diff_id}"
        )
    return unpacker.result


def _measured(
    source: BlobReader, hashed: Callable[[bytes], None], budget: Budget
) -> Generator[bytes]:
    blob = source.blob
    total, bomb = 0, bomb_limit(blob.size)
    with closing(decompressed(source, source)) as chunks:
        for chunk in chunks:
            source.check()
            budget.spend(size_bytes=len(chunk))
            total += len(chunk)
            if total > bomb:
                raise ResourceExhausted(
                    f"{blob.digest}: {blob.size} bytes unpack to more than {bomb}"
                )
            hashed(chunk)
            yield chunk


class _Unpacker:
    """The unpacking of one layer: the entries of an archive, in its order, below the directory `root`."""

    def __init__(self, root: int, budget: Budget) -> None:
        self.result = Unpacked()
        self._directories = Directories(root, self._imply)
        self._budget = budget
        self._postponed_bytes = 0
        self._whiteout_bytes = 0
        self._makers: dict[tar.Kind, Callable[[int, str, str, tar.Entry], None]] = {
            "directory": self._make_directory,
            "symlink": self._make_symlink,
            "link": self._make_link,
            "char": self._make_node,
            "block": self._make_node,
            "fifo": self._make_node,
        }

    def add(self, entry: tar.Entry, pieces: Iterator[tar.Piece]) -> None:
        self._budget.spend(entries=1)
        try:
            self._add(entry, pieces)
        except OSError as error:
            if error.errno in _MALFORMED_ERRNOS:
                raise malformed(entry.name, os.strerror(error.errno)) from None
            raise

    def finish(self) -> None:
        self._directories.set_times()

    def close(self) -> None:
        self._directories.close()

    def _add(self, entry: tar.Entry, pieces: Iterator[tar.Piece]) -> None:
        path = clean_path(entry.name)
        parent, _, name = path.rpartition("/")
        if WHITEOUT in path and self._is_whiteout(parent, name):
            return
        if not path:
            self._describe_root(entry)
        elif entry.kind == "file":
            self._make_file(self._directories.get(parent), name, entry, pieces)
        else:
            self._makers[entry.kind](self._directories.get(parent), name, path, entry)

    # --- entries ---

    def _make_file(
        self, directory: int, name: str, entry: tar.Entry, pieces: Iterator[tar.Piece]
    ) -> None:
        create = partial(os.open, name, NEW_FILE, 0o600, dir_fd=directory)
        file = self._anew(directory, name, create)
        try:
            taken = _write_content(file, pieces, self._budget)
            _describe_open(file, entry)
            os.utime(file, ns=(entry.mtime_ns, entry.mtime_ns))
        finally:
            os.close(file)
        self._count(taken)

    def _describe_root(self, entry: tar.Entry) -> None:
        if entry.kind != "directory":
            raise malformed(entry.name, f"a {entry.kind} as the root")
        self._describe_directory(os.dup(self._directories.root), "", entry)

    def _make_directory(self, directory: int, name: str, path: str, entry: tar.Entry) -> None:
        try:
            os.mkdir(name, 0o755, dir_fd=directory)
        except FileExistsError:
            self._replace_by_directory(directory, name)
        else:
            self._count(_DISK_BLOCK)
        self._describe_directory(os.open(name, DIRECTORY, dir_fd=directory), path, entry)

    def _replace_by_directory(self, directory: int, name: str) -> None:
        """Make a directory where an earlier entry is: a directory stays, any other hid what is below, as this must."""
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            return
        self._remove(directory, name)
        os.mkdir(name, 0o755, dir_fd=directory)
        make_opaque(directory, name)
        self._count(_DISK_BLOCK)

    def _describe_directory(self, descriptor: int, path: str, entry: tar.Entry) -> None:
        """Set the attributes of a directory, and close its descriptor."""
        try:
            _describe_open(descriptor, entry)
        finally:
            os.close(descriptor)
        self.result.implied.pop(path, None)
        self._directories.set_time_later(path, entry.mtime_ns)

    def _make_symlink(self, directory: int, name: str, _path: str, entry: tar.Entry) -> None:
        if not entry.target:
            raise malformed(entry.name, "a link without a target")
        self._anew(directory, name, partial(os.symlink, entry.target, name, dir_fd=directory))
        self._describe(directory, name, entry)

    def _make_node(self, directory: int, name: str, _path: str, entry: tar.Entry) -> None:
        mode, device = _NODES[entry.kind] | 0o600, os.makedev(*entry.device)
        self._anew(directory, name, partial(os.mknod, name, mode, device, dir_fd=directory))
        self._describe(directory, name, entry)
        os.chmod(name, entry.mode, dir_fd=directory)

    def _make_link(self, directory: int, name: str, path: str, entry: tar.Entry) -> None:
        target = clean_path(entry.target)
        if target == path or not target:
            raise malformed(entry.name, "a hard link to itself")
        try:
            self._link(target, directory, name)
        except FileNotFoundError:
            self._postpone_link(directory, name, path, self.result.links.get(target, target))

    def _link(self, target: str, directory: int, name: str) -> None:
        source, source_name = open_parent(self._directories.root, target)
        places = partial(os.link, source_name, name, src_dir_fd=source, dst_dir_fd=directory)
        try:
            self._anew(directory, name, partial(places, follow_symlinks=False))
        finally:
            os.close(source)

    def _postpone_link(self, directory: int, name: str, path: str, target: str) -> None:
        try:
            self._remove(directory, name)
        except FileNotFoundError:
            pass
        self._postpone(memory_of(path) + memory_of(target))
        self.result.links[path] = target

    # --- whiteouts ---

    def _is_whiteout(self, parent: str, name: str) -> bool:
        """Make the whiteout that a name stands for; false when it stands for a file."""
        above = parent.split("/")
        if any(part.startswith(_AUFS) and part != OPAQUE for part in (*above, name)):
            return True
        if any(part.startswith(WHITEOUT) for part in above):
            raise malformed(f"{parent}/{name}", "in a whiteout")
        if name == OPAQUE:
            make_opaque(self._directories.get(parent), ".")
            self.result.opaque |= not parent
        elif name.startswith(WHITEOUT):
            self._make_whiteout(parent, name.removeprefix(WHITEOUT))
        else:
            return False
        return True

    def _make_whiteout(self, parent: str, name: str) -> None:
        """Make a whiteout that hides `name` of the layers below; what this layer has under the name stays."""
        if name in ("", ".", ".."):
            raise malformed(f"{parent}/{WHITEOUT}{name}", "hides nothing that can be")
        path = f"{parent}/{name}" if parent else name
        if path in self.result.links:
            return
        directory = self._directories.get(parent)
        try:
            make_whiteout(directory, name)
        except FileExistsError:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                make_opaque(directory, name)
            return
        self._count(0)
        self._remember_whiteout(path)

    def _remember_whiteout(self, path: str) -> None:
        """Note a whiteout, up to a bound of memory; beyond it one that hides nothing stays, which does little harm."""
        self._whiteout_bytes += memory_of(path)
        if self._whiteout_bytes <= _MAX_POSTPONED_BYTES:
            self.result.whiteouts[path] = None

    # --- all kinds ---

    def _anew(self, directory: int, name: str, make: Callable[[], T]) -> T:
        """Make an entry; an earlier one of the name is removed."""
        try:
            return make()
        except FileExistsError:
            self._remove(directory, name)
            return make()

    def _remove(self, directory: int, name: str) -> None:
        try:
            os.unlink(name, dir_fd=directory)
        except IsADirectoryError:
            files.remove_tree(f"/proc/self/fd/{directory}/{name}")
        self._directories.forget(kept=directory)

    def _describe(self, directory: int, name: str, entry: tar.Entry) -> None:
        os.chown(name, entry.uid, entry.gid, dir_fd=directory, follow_symlinks=False)
        times = (entry.mtime_ns, entry.mtime_ns)
        os.utime(name, ns=times, dir_fd=directory, follow_symlinks=False)
        self._count(0)

    def _imply(self, path: str) -> None:
        self._budget.spend(entries=1)
        self._postpone(memory_of(path))
        self.result.implied[path] = None
        self._count(_DISK_BLOCK)

    def _count(self, size_bytes: int) -> None:
        self.result.used_bytes += -(-size_bytes // _DISK_BLOCK) * _DISK_BLOCK
        self.result.inodes += 1

    def _postpone(self, size_bytes: int) -> None:
        self._postponed_bytes += size_bytes
        if self._postponed_bytes > _MAX_POSTPONED_BYTES:
            raise ResourceExhausted("layer: too many files that rest on layers below it")


def clean_path(name: str) -> str:
    """The path of an entry relative to the layer; "" is the layer's own directory.

    ".." removes the component before it, as in every other reader of layers, without regard to links. Raises
    `InvalidArgument` where it leads out.
    """
    if len(name) > _MAX_PATH:
        raise malformed(name, "the path is too long")
    parts: list[str] = []
    for part in name.split("/"):
        if part == "..":
            if not parts:
                raise malformed(name, '".." leads out of the layer')
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def malformed(name: str, why: str) -> InvalidArgument:
    return InvalidArgument(f'layer entry "{tar.shown(name)}": {why}')


def _write_content(file: int, pieces: Iterator[tar.Piece], budget: Budget) -> int:
    """Write a file and return how many bytes of disk it takes, in whole blocks: a hole is length without data.

    What the regions of a sparse file take beyond their data is spent before it is written: one byte in each of 100,000
    regions is as many blocks.
    """
    at = allocated = taken = 0
    sparse = False
    for piece in pieces:
        if isinstance(piece, tar.Hole):
            sparse = True
            at = os.lseek(file, piece.size, os.SEEK_CUR)
            os.ftruncate(file, at)
            continue
        start = max(allocated, at - at % _DISK_BLOCK)
        at += len(piece)
        allocated = at + -at % _DISK_BLOCK
        if sparse:
            budget.add(max(0, allocated - start - len(piece)))
        write_all(file, piece)
        taken += allocated - start
    return taken


def write_all(file: int, data: memoryview) -> None:
    while data:
        data = data[os.write(file, data) :]


def _describe_open(descriptor: int, entry: tar.Entry) -> None:
    """Set owner, mode and extended attributes."""
    # First: chown(2) clears set-id bits, and the kernel drops security.capability (capabilities(7)).
    os.fchown(descriptor, entry.uid, entry.gid)
    os.fchmod(descriptor, entry.mode)
    for name, value in entry.xattrs.items():
        if name.startswith(_REFUSED_XATTRS):
            raise malformed(entry.name, f"attribute {tar.shown(name)}")
        if name.startswith(_KEPT_XATTRS):
            _set_xattr(descriptor, name, value)


def _set_xattr(descriptor: int, name: str, value: bytes) -> None:
    """Set an extended attribute, if the file system has such attributes."""
    try:
        os.setxattr(descriptor, name, value)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
