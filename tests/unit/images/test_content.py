"""Blobs that are written and read at once, documents, and decompression in any pieces."""

from __future__ import annotations

import gzip
import io
import threading
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.errors import DataLoss, InvalidArgument, NotFound, Unavailable
from nodeagent.images.compression import decompressed
from nodeagent.images.content import Blob, BlobReader, Documents, Starved
from nodeagent.images.slots import Permits
from tests.tars import digest

DATA = bytes(range(256)) * 40


def blob(folder: Path, data: bytes = DATA) -> Blob:
    return Blob(folder / "blob", digest(data), len(data))


def read_in_thread(made: Blob) -> tuple[threading.Thread, list[object]]:
    """What a reader got when the thread has ended: the bytes, or the error."""
    got: list[object] = []
    reader = BlobReader(made)

    def read() -> None:
        try:
            got.append(reader.read())
        except Exception as error:  # noqa: BLE001 (whatever it is, the test wants to see it)
            got.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    return thread, got


def test_a_reader_follows_the_writer(tmp_path: Path) -> None:
    made = blob(tmp_path)
    thread, got = read_in_thread(made)
    for at in range(0, len(DATA), 1000):
        made.append(DATA[at : at + 1000])
    made.finish()
    thread.join(5)
    assert got == [DATA]
    made.remove()
    assert not made.path.exists()


def test_a_reader_learns_of_a_failure(tmp_path: Path) -> None:
    made = blob(tmp_path)
    thread, got = read_in_thread(made)
    made.append(DATA[:10])
    made.fail(NotFound("gone"))
    thread.join(5)
    assert isinstance(got[0], NotFound)
    made.remove()


def test_a_reader_is_stopped_alone(tmp_path: Path) -> None:
    made = blob(tmp_path)
    stopped, going = BlobReader(made), BlobReader(made)
    threading.Timer(0.01, stopped.stop).start()
    with pytest.raises(Unavailable):
        stopped.read(1)
    made.append(DATA)
    made.finish()
    assert going.read() == DATA
    made.remove()


def test_a_reader_that_waits_gives_way(tmp_path: Path) -> None:
    made = blob(tmp_path)
    made.append(DATA[:10])
    reader = BlobReader(made)
    reader.give_way()
    assert reader.read(10) == DATA[:10]  # it does not have to wait
    with pytest.raises(Starved):
        reader.read(1)
    waiting = BlobReader(made)
    threading.Timer(0.01, waiting.give_way).start()
    with pytest.raises(Starved):
        waiting.read()
    made.remove()


def test_a_reader_that_waits_lets_others_work(tmp_path: Path) -> None:
    made, permits, read = blob(tmp_path), Permits(1), list[bytes]()

    def work() -> None:
        with permits:
            read.append(BlobReader(made, permits).readall())

    thread = threading.Thread(target=work)
    thread.start()
    with permits:  # which it has, until it waits
        made.append(DATA)
        made.finish()
    thread.join(60)
    assert read == [DATA]
    assert permits._free == 1
    made.remove()


@pytest.mark.parametrize("data", [DATA[:-1], DATA + b"x", DATA[::-1]])
def test_a_blob_is_verified(tmp_path: Path, data: bytes) -> None:
    made = blob(tmp_path)

    def fill() -> None:
        made.append(data)
        made.finish()

    with pytest.raises(DataLoss, match=made.digest):
        fill()
    made.remove()


def test_a_blob_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(DATA)
    made = Blob(file, digest(DATA), len(DATA), complete=True)
    assert BlobReader(made).read() == DATA
    made.close()
    assert file.exists()


def test_documents(tmp_path: Path) -> None:
    documents = Documents(tmp_path / "sha256")
    for data in (b"{}", b"[]"):
        documents.put(data)
    assert documents.get(digest(b"{}")) == b"{}"
    assert documents.get(digest(b"none")) is None
    assert (len(documents), documents.used_bytes) == (2, 4)
    documents.keep({digest(b"[]")})
    assert documents.get(digest(b"{}")) is None
    assert Documents(tmp_path / "sha256").used_bytes == 2


def test_a_damaged_document_is_not_there(tmp_path: Path) -> None:
    documents = Documents(tmp_path)
    documents.put(b"{}")
    (tmp_path / digest(b"{}").removeprefix("sha256:")).write_bytes(b"[]")
    assert documents.get(digest(b"{}")) is None


class Dribbling(io.RawIOBase):
    """Gives one byte at a time."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        return self._data.readinto(memoryview(buffer)[:1])


COMPRESSORS = [bytes, gzip.compress, zstandard.compress]


@given(st.binary(max_size=300), st.sampled_from(COMPRESSORS), st.booleans())
def test_decompression(data: bytes, compress: type[bytes], dribble: bool) -> None:
    compressed = compress(data)
    source = Dribbling(compressed) if dribble else io.BytesIO(compressed)
    if compress is not bytes or data[:2] != b"\x1f\x8b":
        assert b"".join(decompressed(source)) == data


@pytest.mark.parametrize("compress", COMPRESSORS[1:])
def test_several_parts_are_one(compress: type[bytes]) -> None:
    source = io.BytesIO(compress(b"one") + compress(b"two"))
    assert b"".join(decompressed(source)) == b"onetwo"


@given(st.binary(max_size=100), st.sampled_from([b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"]))
def test_damage_is_named(data: bytes, magic: bytes) -> None:
    try:
        list(decompressed(io.BytesIO(magic + data)))
    except InvalidArgument as error:
        text = str(error)
    else:
        return
    assert "damaged" in text


def test_errors_of_the_source_are_its_own() -> None:
    class Broken(Dribbling):
        def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
            raise NotFound("gone")

    for data in (gzip.compress(b"x")[:8], zstandard.compress(b"x")[:8], b"plain"):
        source = Broken(b"")
        chunks = decompressed(_After(data, source))
        with pytest.raises(NotFound):
            list(chunks)


class _After(io.RawIOBase):
    def __init__(self, data: bytes, rest: io.RawIOBase) -> None:
        self._data = io.BytesIO(data)
        self._rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        return self._data.readinto(buffer) or self._rest.readinto(buffer) or 0
