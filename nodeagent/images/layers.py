"""Unpacking of a layer into a directory of its own, as a lower layer of an overlay mount.

The archive is hostile until proven otherwise. Every name is looked up below the descriptor of the layer's directory,
with it as the root directory (openat2(2), RESOLVE_IN_ROOT), so that no link and no ".." leads out; the last component
is always made anew, never followed. What is refused: "..", names that are too long, whiteouts of "." and "..",
attributes that overlay mounts obey. What is made as other runtimes make it: set-id bits, device nodes, FIFOs,
absolute links (they are only ever followed inside a container).

Whiteouts (image-spec ``layer.md``) become overlay's: a character device 0:0, and ``trusted.overlay.opaque``.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from nodeagent import files
from nodeagent.errors import DataLoss, InvalidArgument, ResourceExhausted
from nodeagent.images import tar
from nodeagent.images.budget import BOMB_BYTES, BOMB_RATIO, Budget, is_full
from nodeagent.images.compression import decompressed
from nodeagent.images.content import BlobReader
from nodeagent.linux import confined

WHITEOUT = ".wh."
OPAQUE = ".wh..wh..opq"
OPAQUE_XATTR = "trusted.overlay.opaque"
_AUFS = ".wh..wh."  # names that aufs kept for itself; old images have them

_MAX_PATH = 4096
_MAX_PENDING_BYTES = 64 << 20
_MAX_OPEN_DIRECTORIES = 64
_DISK_BLOCK = 4096

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY_PATH = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

# Labels of the machine that built the image are left out; what overlay itself would obey is refused.
_KEPT_XATTRS = ("user.", "security.capability", "system.posix_acl_")
_REFUSED_XATTRS = ("trusted.overlay.", "user.overlay.")

# These tell about the archive, not about the node.
_MALFORMED_ERRNOS = frozenset(
    (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.EINVAL, errno.EPERM, errno.EMLINK)
)


@dataclass(slots=True)
class Unpacked:
    """An unpacked layer. implied: directories that it has files in but does not describe; links: hard links, by
    name, to files that it does not have. Both are to be completed from the layers below it.

    opaque: it hides all of these; an overlay mount does not look for that in the root of a layer.
    """

    used_bytes: int = 0
    inodes: int = 0
    opaque: bool = False
    implied: dict[str, None] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)


def unpack(source: BlobReader, directory: Path, diff_id: str, budget: Budget) -> Unpacked:
    """Make `directory` of a layer's blob, which may still be arriving. Nothing is synced.

    Raises `DataLoss` when the content does not have the diff ID, `InvalidArgument` or `Unsupported` when it is no
    good layer, `ResourceExhausted`.
    """
    directory.mkdir(mode=0o755)
    root = os.open(directory, _DIRECTORY)
    content = hashlib.sha256()
    try:
        chunks = _measured(source, content.update, budget)
        unpacker = _Unpacker(root, budget)
        try:
            for entry, pieces in tar.read(chunks):
                unpacker.add(entry, pieces)
            unpacker.finish()
        finally:
            unpacker.close()
        for _ in chunks:
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
) -> Iterator[bytes]:
    blob = source.blob
    total, bomb = 0, max(BOMB_BYTES, BOMB_RATIO * blob.size)
    for chunk in decompressed(source):
        source.check()
        budget.spend(size_bytes=len(chunk))
        total += len(chunk)
        if total > bomb:
            raise ResourceExhausted(f"{blob.digest}: {blob.size} bytes unpack to more than {bomb}")
        hashed(chunk)
        yield chunk


class _Unpacker:
    """One layer in the making: the entries of an archive, in its order, below the directory `root`."""

    def __init__(self, root: int, budget: Budget) -> None:
        self.result = Unpacked()
        self._root = root
        self._budget = budget
        self._open: dict[str, int] = {}
        self._mtimes: dict[str, int] = {}
        self._mtimes_bytes = 0
        self._pending_bytes = 0
        self._makers: dict[tar.Kind, Callable[[int, str, str, tar.Entry], None]] = {
            "directory": self._make_directory,
            "symlink": self._make_symlink,
            "link": self._make_link,
            "char": self._make_node,
            "block": self._make_node,
            "fifo": self._make_node,
        }

    def add(self, entry: tar.Entry, pieces: Iterator[memoryview]) -> None:
        self._budget.spend(entries=1)
        try:
            self._add(entry, pieces)
        except OSError as error:
            if error.errno in _MALFORMED_ERRNOS:
                reason = os.strerror(error.errno)
                raise InvalidArgument(f'layer entry "{_shown(entry.name)}": {reason}') from None
            raise

    def _add(self, entry: tar.Entry, pieces: Iterator[memoryview]) -> None:
        path = clean_path(entry.name)
        parent, _, name = path.rpartition("/")
        if WHITEOUT in path and self._is_whiteout(parent, name):
            return
        if not path:
            self._describe_root(entry)
            return
        directory = self._directory(parent)
        if entry.kind == "file":
            self._make_file(directory, name, entry, pieces)
        else:
            self._makers[entry.kind](directory, name, path, entry)

    def finish(self) -> None:
        """Directories get their times last, after everything that was put into them."""
        for path, mtime in self._mtimes.items():
            self._set_directory_time(path, mtime)
        self._mtimes.clear()
        self._mtimes_bytes = 0

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    # --- entries ---

    def _make_file(
        self, directory: int, name: str, entry: tar.Entry, pieces: Iterator[memoryview]
    ) -> None:
        try:
            file = os.open(name, _NEW_FILE, 0o600, dir_fd=directory)
        except FileExistsError:
            self._remove(directory, name)
            file = os.open(name, _NEW_FILE, 0o600, dir_fd=directory)
        try:
            for piece in pieces:
                write_all(file, piece)
            # chown(2) clears set-id bits and security.capability, so it comes first.
            os.fchown(file, entry.uid, entry.gid)
            os.fchmod(file, entry.mode)
            if entry.xattrs:
                _set_xattrs(file, entry)
            os.utime(file, ns=(entry.mtime_ns, entry.mtime_ns))
        finally:
            os.close(file)
        self._count(entry.size)

    def _describe_root(self, entry: tar.Entry) -> None:
        if entry.kind != "directory":
            raise InvalidArgument(f'layer entry "{_shown(entry.name)}": a {entry.kind} as the root')
        self._describe_directory(os.dup(self._root), "", entry)

    def _make_directory(self, directory: int, name: str, path: str, entry: tar.Entry) -> None:
        try:
            os.mkdir(name, 0o755, dir_fd=directory)
        except FileExistsError:
            self._replace_by_directory(directory, name)
        else:
            self._count(_DISK_BLOCK)
        self._describe_directory(os.open(name, _DIRECTORY, dir_fd=directory), path, entry)

    def _replace_by_directory(self, directory: int, name: str) -> None:
        """A directory where the layer has something: one that is there stays, a whiteout makes it opaque."""
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            return
        self._remove(directory, name)
        os.mkdir(name, 0o755, dir_fd=directory)
        self._count(_DISK_BLOCK)
        if is_whiteout(status):
            _make_opaque(directory, name)

    def _describe_directory(self, descriptor: int, path: str, entry: tar.Entry) -> None:
        """Takes the descriptor."""
        try:
            os.fchown(descriptor, entry.uid, entry.gid)
            os.fchmod(descriptor, entry.mode)
            _set_xattrs(descriptor, entry)
        finally:
            os.close(descriptor)
        self.result.implied.pop(path, None)
        self._mtimes[path] = entry.mtime_ns
        self._mtimes_bytes += _cost(path)
        if self._mtimes_bytes > _MAX_PENDING_BYTES:
            self.finish()  # what comes into them later changes their times: better than no bound

    def _make_symlink(self, directory: int, name: str, _path: str, entry: tar.Entry) -> None:
        if not entry.target:
            raise InvalidArgument(f'layer entry "{_shown(entry.name)}": a link without a target')
        try:
            os.symlink(entry.target, name, dir_fd=directory)
        except FileExistsError:
            self._remove(directory, name)
            os.symlink(entry.target, name, dir_fd=directory)
        self._describe(directory, name, entry)

    def _make_node(self, directory: int, name: str, _path: str, entry: tar.Entry) -> None:
        kinds = {"char": stat.S_IFCHR, "block": stat.S_IFBLK, "fifo": stat.S_IFIFO}
        mode, device = kinds[entry.kind] | 0o600, os.makedev(*entry.device)
        try:
            os.mknod(name, mode, device, dir_fd=directory)
        except FileExistsError:
            self._remove(directory, name)
            os.mknod(name, mode, device, dir_fd=directory)
        self._describe(directory, name, entry)
        os.chmod(name, entry.mode, dir_fd=directory)

    def _make_link(self, directory: int, name: str, path: str, entry: tar.Entry) -> None:
        target = clean_path(entry.target)
        if target == path or not target:
            raise InvalidArgument(f'layer entry "{_shown(entry.name)}": a hard link to itself')
        try:
            self._link(target, directory, name)
        except FileNotFoundError:
            self._postpone_link(directory, name, path, self.result.links.get(target, target))

    def _link(self, target: str, directory: int, name: str) -> None:
        parent, _, target_name = target.rpartition("/")
        source = confined.open_path(self._root, parent or ".", _DIRECTORY_PATH)
        link = partial(os.link, target_name, name, src_dir_fd=source, dst_dir_fd=directory)
        try:
            link(follow_symlinks=False)
        except FileExistsError:
            self._remove(directory, name)
            link(follow_symlinks=False)
        finally:
            os.close(source)

    def _postpone_link(self, directory: int, name: str, path: str, target: str) -> None:
        try:
            self._remove(directory, name)
        except FileNotFoundError:
            pass
        self._postpone(_cost(path) + _cost(target))
        self.result.links[path] = target

    # --- whiteouts ---

    def _is_whiteout(self, parent: str, name: str) -> bool:
        """Make the whiteout that a name stands for; false when it stands for a file."""
        if any(part.startswith(_AUFS) and part != OPAQUE for part in (*parent.split("/"), name)):
            return True
        if any(part.startswith(WHITEOUT) for part in parent.split("/")):
            raise InvalidArgument(f'layer entry "{_shown(parent)}/{_shown(name)}": in a whiteout')
        if name == OPAQUE:
            _make_opaque(self._directory(parent), ".")
            self.result.opaque |= not parent
        elif name.startswith(WHITEOUT):
            self._make_whiteout(parent, name.removeprefix(WHITEOUT))
        else:
            return False
        return True

    def _make_whiteout(self, parent: str, name: str) -> None:
        """Hides `name` of the layers below; what this layer has under the name stays."""
        if name in ("", ".", ".."):
            raise InvalidArgument(f'layer entry "{_shown(parent)}/{WHITEOUT}{name}": no whiteout')
        directory = self._directory(parent)
        try:
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=directory)
        except FileExistsError:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                _make_opaque(directory, name)
            return
        self._count(0)

    # --- directories ---

    def _directory(self, path: str) -> int:
        """A descriptor of the directory `path` (links followed inside the layer), made where it is missing."""
        if not path:
            return self._root
        descriptor = self._open.get(path)
        if descriptor is None:
            if len(self._open) >= _MAX_OPEN_DIRECTORIES:
                self.close()
            descriptor = self._open_directory(path)
            self._open[path] = descriptor
        return descriptor

    def _open_directory(self, path: str) -> int:
        try:
            return confined.open_path(self._root, path, _DIRECTORY_PATH)
        except FileNotFoundError:
            self._make_implied(path)
        return confined.open_path(self._root, path, _DIRECTORY_PATH)

    def _make_implied(self, path: str) -> None:
        missing: list[str] = []
        while (directory := self._existing(path)) is None:
            self._budget.spend(entries=1)
            self._postpone(_cost(path))
            missing.append(path)
            path = path.rpartition("/")[0]
        for path in reversed(missing):
            above, directory = directory, self._step_down(directory, path)
            os.close(above)
            os.chmod(f"/proc/self/fd/{directory}", 0o755)
            self.result.implied[path] = None
            self._count(_DISK_BLOCK)
        os.close(directory)

    def _step_down(self, directory: int, path: str) -> int:
        """Make the last component of the path, in the directory that the rest of it leads to."""
        name = path.rpartition("/")[2]
        try:
            os.mkdir(name, 0o755, dir_fd=directory)
        except FileExistsError:  # a link to nothing
            return confined.make_path(self._root, path, directory=True)
        return os.open(name, _DIRECTORY_PATH | os.O_NOFOLLOW, dir_fd=directory)

    def _existing(self, path: str) -> int | None:
        try:
            return confined.open_path(self._root, path or ".", _DIRECTORY_PATH)
        except FileNotFoundError:
            return None

    def _set_directory_time(self, path: str, mtime_ns: int) -> None:
        try:
            directory = confined.open_path(self._root, path or ".", _DIRECTORY)
        except (FileNotFoundError, NotADirectoryError):
            return  # a later entry has replaced it
        try:
            os.utime(directory, ns=(mtime_ns, mtime_ns))
        finally:
            os.close(directory)

    # --- all kinds ---

    def _describe(self, directory: int, name: str, entry: tar.Entry) -> None:
        os.chown(name, entry.uid, entry.gid, dir_fd=directory, follow_symlinks=False)
        times = (entry.mtime_ns, entry.mtime_ns)
        os.utime(name, ns=times, dir_fd=directory, follow_symlinks=False)
        self._count(0)

    def _remove(self, directory: int, name: str) -> None:
        """A later entry replaces an earlier one. Links may have led to what is gone: look everything up anew."""
        try:
            os.unlink(name, dir_fd=directory)
        except IsADirectoryError:
            files.remove_tree(f"/proc/self/fd/{directory}/{name}")
        kept = {path: number for path, number in self._open.items() if number == directory}
        for path in self._open.keys() - kept:
            os.close(self._open[path])
        self._open = kept

    def _count(self, size_bytes: int) -> None:
        self.result.used_bytes += -(-size_bytes // _DISK_BLOCK) * _DISK_BLOCK
        self.result.inodes += 1

    def _postpone(self, cost: int) -> None:
        self._pending_bytes += cost
        if self._pending_bytes > _MAX_PENDING_BYTES:
            raise ResourceExhausted("layer: too many files that rest on layers below it")


def clean_path(name: str) -> str:
    """The path of an entry relative to the layer; "" is the layer's own directory. Raises `InvalidArgument`."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise InvalidArgument(f'layer entry "{_shown(name)}": ".." in a path')
    if len(name) > _MAX_PATH:
        raise InvalidArgument(f'layer entry "{_shown(name)}": the path is too long')
    return "/".join(parts)


def is_whiteout(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def write_all(file: int, data: memoryview) -> None:
    while data:
        data = data[os.write(file, data) :]


def _make_opaque(directory: int, name: str) -> None:
    descriptor = os.open(name, _DIRECTORY, dir_fd=directory)
    try:
        os.setxattr(descriptor, OPAQUE_XATTR, b"y")
    finally:
        os.close(descriptor)


def _set_xattrs(descriptor: int, entry: tar.Entry) -> None:
    for name, value in entry.xattrs.items():
        if name.startswith(_REFUSED_XATTRS):
            raise InvalidArgument(f'layer entry "{_shown(entry.name)}": attribute {name}')
        if name.startswith(_KEPT_XATTRS):
            _set_xattr(descriptor, name, value)


def _set_xattr(descriptor: int, name: str, value: bytes) -> None:
    try:
        os.setxattr(descriptor, name, value)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise


def _cost(path: str) -> int:
    """About the memory that remembering a path takes."""
    return len(path) + 200


def _shown(name: str) -> str:
    return name[:200].encode("utf-8", "backslashreplace").decode()
