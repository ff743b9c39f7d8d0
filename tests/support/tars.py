"""Tar archives made by hand, and layers unpacked from them."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nodeagent.images.budget import Budget
from nodeagent.images.content import Blob, BlobReader
from nodeagent.images.unpack import inheritance, layers

Member = tuple[tarfile.TarInfo, bytes]


def member(
    name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **fields: Any
) -> tuple[tarfile.TarInfo, bytes]:
    """A member for `archive`; fields as of TarInfo, xattrs as a dict of str."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    for key, value in fields.pop("xattrs", {}).items():
        info.pax_headers = {**info.pax_headers, f"SCHILY.xattr.{key}": value}
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def file(name: str, data: bytes = b"", **fields: Any) -> Member:
    return member(name, tarfile.REGTYPE, data, **fields)


def directory(name: str, **fields: Any) -> Member:
    return member(name, tarfile.DIRTYPE, **{"mode": 0o755, **fields})


def symlink(name: str, target: str, **fields: Any) -> Member:
    return member(name, tarfile.SYMTYPE, linkname=target, **fields)


def link(name: str, target: str) -> Member:
    return member(name, tarfile.LNKTYPE, linkname=target)


def char(name: str, major: int, minor: int, **fields: Any) -> Member:
    return member(name, tarfile.CHRTYPE, devmajor=major, devminor=minor, **fields)


def archive(*members: Member, form: int = tarfile.PAX_FORMAT) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=form) as writer:
        for info, data in members:
            writer.addfile(info, io.BytesIO(data))
    return raw.getvalue()


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class Workshop:
    """A directory to unpack layers in, each over the ones before it."""

    def __init__(
        self, folder: Path, *, max_bytes: int = 1 << 30, max_entries: int = 10_000
    ) -> None:
        self.folder = folder
        self.layers: list[Path] = []
        self._count = 0
        self._bounds = {"max_bytes": max_bytes, "max_entries": max_entries}

    def unpack(self, *members: Member) -> Path:
        """The directory of the next layer."""
        tar = archive(*members)
        return self.unpack_blob(gzip.compress(tar, 1), digest(tar))

    def unpack_blob(self, data: bytes, diff_id: str) -> Path:
        blob = self._blob(data)
        target = self.folder / f"layer-{self._count}"
        self._count += 1
        budget = Budget(self.folder, **self._bounds)
        try:
            unpacked = layers.unpack(BlobReader(blob), target, diff_id, budget)
        finally:
            blob.close()
            blob.path.unlink()
        inheritance.complete(target, unpacked, self.below, budget)
        if unpacked.opaque:
            self.layers.clear()
        self.layers.append(target)
        return target

    @property
    def below(self) -> Sequence[Path]:
        """The layers so far that can be seen, uppermost first."""
        return self.layers[::-1]

    def _blob(self, data: bytes) -> Blob:
        blob = Blob(self.folder / "blob", digest(data), len(data))
        try:
            blob.append(data)
            blob.finish()
        except BaseException:
            blob.close()
            blob.path.unlink(missing_ok=True)
            raise
        return blob
