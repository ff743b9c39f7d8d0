"""A disk that keeps what was synced, and of the rest whatever it likes.

The model is pessimistic, as POSIX is, and no more lenient than ext4 and XFS are:

* the content of a file is durable after fsync(2) of it, or syncfs(2); before that, of each write any sectors may be on
  the disk, those of a later write without those of an earlier one;
* names are durable after fsync(2) of their directory, or syncfs(2); before that, the file system's journal has some
  first part of what was done to all names. So a file may be there, renamed over another one, and be empty;
* fsync(2) of a file makes no name durable.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.power import trace
from tests.chaos.power.trace import Call

SECTOR = 512


@dataclass(slots=True)
class Node:
    """A file (data), a directory (entries: inode by name), or a link (target)."""

    kind: str
    data: bytearray = field(default_factory=bytearray)
    entries: dict[str, int] = field(default_factory=dict)
    target: str = ""

    def copy(self) -> Node:
        return Node(self.kind, bytearray(self.data), dict(self.entries), self.target)


@dataclass(frozen=True, slots=True)
class Write:
    inode: int
    at: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Truncate:
    inode: int
    size: int


@dataclass(frozen=True, slots=True)
class Name:
    """A name that appears in a directory, or goes (inode 0); `source` is where a rename takes it from."""

    directory: int
    name: str
    inode: int
    source: tuple[int, str] | None = None


Effect = Write | Truncate | Name
Nodes = dict[int, Node]
ROOT = 1


class Disk:
    """The files below a directory: as processes see them (`now`), and what is safe (`safe`, with `pending` to come)."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.now: Nodes = {}
        self._next = ROOT
        self._read(root)
        self.safe = {inode: node.copy() for inode, node in self.now.items()}
        self.pending: list[tuple[float, Effect]] = []
        self._positions: dict[int, tuple[int, int]] = {}

    def _read(self, path: Path) -> int:
        inode = self._new(Node("file"))
        node = self.now[inode]
        if path.is_symlink():
            node.kind, node.target = "link", str(path.readlink())
        elif path.is_dir():
            node.kind = "directory"
            for entry in sorted(path.iterdir()):
                if entry.is_symlink() or entry.is_file() or entry.is_dir():
                    node.entries[entry.name] = self._read(entry)
        else:
            node.data[:] = path.read_bytes()
        return inode

    def _new(self, node: Node) -> int:
        inode = self._next
        self._next += 1
        self.now[inode] = node
        return inode

    # --- looking up ---

    def find(self, path: str) -> int:
        """The inode of a path, 0 where it is not below the root."""
        if path != self.root and not path.startswith(f"{self.root}/"):
            return 0
        inode = ROOT
        for part in path[len(self.root) :].split("/"):
            if part:
                inode = self.now[inode].entries.get(part, 0)
            if not inode:
                return 0
        return inode

    def _parent(self, path: str) -> tuple[int, str]:
        directory, _, name = path.rpartition("/")
        return self.find(directory), name

    # --- what is done ---

    def take(self, call: Call) -> None:
        method = getattr(self, f"_{call.name}", None)
        if method is not None:
            method(call, *call.arguments)

    def _do(self, call: Call, effect: Effect) -> None:
        apply(self.now, effect)
        self.pending.append((call.ended, effect))

    def _enter(self, call: Call, path: str, node: Node) -> int:
        directory, name = self._parent(path)
        if not directory:
            return 0
        inode = self._new(node)
        self.safe[inode] = node.copy()
        self._do(call, Name(directory, name, inode))
        return inode

    def _openat(self, call: Call, directory: str, name: str, flags: str, *_: str) -> None:
        path = trace.path(directory, name)
        inode = self.find(path)
        if not inode and "O_CREAT" in flags and "O_TMPFILE" not in flags:
            inode = self._enter(call, path, Node("file"))
        if inode and "O_TRUNC" in flags:
            self._do(call, Truncate(inode, 0))
        self._positions[call.result] = (inode, 0)

    def _openat2(self, call: Call, directory: str, name: str, how: str, *_: str) -> None:
        self._openat(call, directory, name, how)

    def _close(self, _call: Call, file: str) -> None:
        self._positions.pop(trace.descriptor(file)[0], None)

    def _lseek(self, call: Call, file: str, *_: str) -> None:
        number, path = trace.descriptor(file)
        inode, _at = self._positions.get(number, (self.find(path), 0))
        self._positions[number] = (inode, call.result)

    def _append(self, call: Call, file: str, data: bytes) -> None:
        number, path = trace.descriptor(file)
        inode, at = self._positions.get(number, (self.find(path), 0))
        if inode and self.now[inode].kind == "file":
            self._do(call, Write(inode, at, data[: call.result]))
            self._positions[number] = (inode, at + call.result)

    def _write(self, call: Call, file: str, data: str, *_: str) -> None:
        if self._is_ours(file):
            self._append(call, file, trace.data(data))

    def _writev(self, call: Call, file: str, data: str, *_: str) -> None:
        if self._is_ours(file):
            self._append(call, file, trace.vector(data))

    def _pwrite64(self, call: Call, file: str, data: str, _size: str, at: str) -> None:
        if inode := self.find(trace.descriptor(file)[1]):
            self._do(call, Write(inode, int(at), trace.data(data)[: call.result]))

    def _is_ours(self, file: str) -> bool:
        return trace.descriptor(file)[1].startswith(f"{self.root}/")

    def _ftruncate(self, call: Call, file: str, size: str) -> None:
        if inode := self.find(trace.descriptor(file)[1]):
            self._do(call, Truncate(inode, int(size)))

    def _mkdirat(self, call: Call, directory: str, name: str, *_: str) -> None:
        self._enter(call, trace.path(directory, name), Node("directory"))

    def _mkdir(self, call: Call, name: str, *_: str) -> None:
        self._enter(call, trace.text(name), Node("directory"))

    def _symlinkat(self, call: Call, target: str, directory: str, name: str) -> None:
        node = Node("link", target=trace.text(target))
        self._enter(call, trace.path(directory, name), node)

    def _symlink(self, call: Call, target: str, name: str) -> None:
        self._enter(call, trace.text(name), Node("link", target=trace.text(target)))

    def _linkat(self, call: Call, source: str, old: str, target: str, new: str, *_: str) -> None:
        inode = self.find(trace.path(source, old))
        directory, name = self._parent(trace.path(target, new))
        if inode and directory:
            self._do(call, Name(directory, name, inode))

    def _unlinkat(self, call: Call, directory: str, name: str, *_: str) -> None:
        self._leave(call, trace.path(directory, name))

    def _unlink(self, call: Call, name: str) -> None:
        self._leave(call, trace.text(name))

    _rmdir = _unlink

    def _leave(self, call: Call, path: str) -> None:
        directory, name = self._parent(path)
        if directory and name in self.now[directory].entries:
            self._do(call, Name(directory, name, 0))

    def _renameat(self, call: Call, source: str, old: str, target: str, new: str, *_: str) -> None:
        self._move(call, trace.path(source, old), trace.path(target, new))

    _renameat2 = _renameat

    def _rename(self, call: Call, old: str, new: str) -> None:
        self._move(call, trace.text(old), trace.text(new))

    def _move(self, call: Call, old: str, new: str) -> None:
        inode = self.find(old)
        directory, name = self._parent(new)
        if inode and directory:
            self._do(call, Name(directory, name, inode, self._parent(old)))

    # --- what is made safe ---

    def _fsync(self, call: Call, file: str) -> None:
        if inode := self.find(trace.descriptor(file)[1]):
            self._settle(lambda effect: _is_of(effect, inode), call.began)

    _fdatasync = _fsync

    def _syncfs(self, call: Call, file: str) -> None:
        if self.find(trace.descriptor(file)[1]):
            self._settle(lambda _: True, call.began)

    def _settle(self, concerns: Callable[[Effect], bool], before: float) -> None:
        left = []
        for ended, effect in self.pending:
            if ended <= before and concerns(effect):
                apply(self.safe, effect)
            else:
                left.append((ended, effect))
        self.pending = left

    # --- the crash ---

    def after_power_loss(self, chance: random.Random) -> Nodes:
        """What may be on the disk when the power comes back."""
        nodes = dict(self.safe)
        owned: set[int] = set()
        names = sum(isinstance(effect, Name) for _, effect in self.pending)
        journal = chance.choice([0, names, chance.randint(0, names)])
        share = chance.choice([0.0, 1.0, 0.5, chance.random()])
        # What is written back goes file by file: one may be there, of which another one is not that it tells of.
        by_file = chance.random() < 0.5
        shares: dict[int, float] = {}

        def share_of(inode: int) -> float:
            return shares.setdefault(inode, chance.choice([0.0, 1.0, share])) if by_file else share

        for _, effect in self.pending:
            if isinstance(effect, Name):
                journal -= 1
                if journal >= 0:
                    apply(nodes, effect, owned)
            elif isinstance(effect, Truncate):
                if chance.random() < share_of(effect.inode):
                    apply(nodes, effect, owned)
            else:
                for part in _kept(effect, share_of(effect.inode), chance):
                    apply(nodes, part, owned)
        return nodes


def _kept(write: Write, share: float, chance: random.Random) -> Iterator[Write]:
    """The sectors of a write that reach the disk: all, none, or some."""
    if chance.random() < 0.8:
        if chance.random() < share:
            yield write
        return
    first = -write.at % SECTOR
    for start in (0, *range(first or SECTOR, len(write.data), SECTOR)):
        end = first if start == 0 and first else start + SECTOR
        if chance.random() < share:
            yield Write(write.inode, write.at + start, write.data[start:end])


def _is_of(effect: Effect, inode: int) -> bool:
    if isinstance(effect, Name):
        return inode == effect.directory or (
            effect.source is not None and inode == effect.source[0]
        )
    return effect.inode == inode


def apply(nodes: Nodes, effect: Effect, owned: set[int] | None = None) -> None:
    """Apply an effect. owned: inodes whose nodes may be changed, None for all; others are copied first."""

    def node(inode: int) -> Node:
        if owned is not None and inode not in owned:
            nodes[inode] = nodes[inode].copy()
            owned.add(inode)
        return nodes[inode]

    if isinstance(effect, Write):
        data = node(effect.inode).data
        if len(data) < effect.at:
            data.extend(bytes(effect.at - len(data)))
        data[effect.at : effect.at + len(effect.data)] = effect.data
    elif isinstance(effect, Truncate):
        data = node(effect.inode).data
        del data[effect.size :]
        data.extend(bytes(effect.size - len(data)))
    else:
        if effect.source is not None:
            node(effect.source[0]).entries.pop(effect.source[1], None)
        if effect.inode:
            node(effect.directory).entries[effect.name] = effect.inode
        else:
            node(effect.directory).entries.pop(effect.name, None)
