"""The first root of a guest: busybox, `init.sh` and the modules that the real root needs."""

from __future__ import annotations

import gzip
import lzma
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.images import static_busybox

INIT = Path(__file__).with_name("init.sh")
FOLDERS = ("bin", "proc", "sys", "dev", "control", "lower", "host", "overlay", "new", "modules")


@dataclass(frozen=True, slots=True)
class Entry:
    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def build(modules: Path, wanted: tuple[str, ...]) -> bytes:
    """A cpio archive; `wanted` modules come with all that they depend on, in order of loading."""
    entries = [Entry(name, stat.S_IFDIR | 0o755) for name in FOLDERS]
    entries += [
        Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
        Entry("dev/null", stat.S_IFCHR | 0o666, device=(1, 3)),
        Entry("bin/busybox", stat.S_IFREG | 0o755, static_busybox().read_bytes()),
        Entry("init", stat.S_IFREG | 0o755, INIT.read_bytes()),
    ]
    loaded = list(_load_order(modules, wanted))
    entries += [
        Entry(f"modules/{_name(path)}.ko", stat.S_IFREG | 0o644, _decompressed(path))
        for path in loaded
    ]
    order = "\n".join(_name(path) for path in loaded)
    entries.append(Entry("modules.list", stat.S_IFREG | 0o644, order.encode()))
    return _cpio(entries)


def _load_order(modules: Path, wanted: tuple[str, ...]) -> Iterator[Path]:
    """By modules.dep, which names what a module needs, the last to load first. Built-in ones are not in it."""
    needs = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, rest = line.partition(":")
        needs[_name(Path(path)).replace("-", "_")] = [path, *rest.split()]
    order = [path for name in wanted for path in reversed(needs.get(name, []))]
    yield from (modules / path for path in dict.fromkeys(order))


def _name(path: Path) -> str:
    return re.sub(r"\.ko.*", "", path.name)


def _decompressed(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    return gzip.decompress(data) if path.suffix == ".gz" else data


def _cpio(entries: list[Entry]) -> bytes:
    """The "newc" format of Documentation/driver-api/early-userspace/buffer-format.rst."""
    parts = []
    for number, entry in enumerate([*entries, Entry("TRAILER!!!", 0)], 1):
        name = entry.name.encode() + b"\0"
        size, (major, minor) = len(entry.data), entry.device
        numbers = (number, entry.mode, 0, 0, 1, 0, size, 0, 0, major, minor, len(name), 0)
        header = b"070701" + b"".join(b"%08X" % value for value in numbers) + name
        parts += [header, b"\0" * (-len(header) % 4), entry.data, b"\0" * (-size % 4)]
    return b"".join(parts)
