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

from nodeagent import disk_reserve
from nodeagent.errors import (
    DataLoss,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from nodeagent.images.content import Blob, BlobReader, Documents, Starved
from nodeagent.images.turns import Permits
from nodeagent.images.unpack.compression import decompressed
from tests.support.tars import digest

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


def test_a_file_is_made_by_the_thread_that_writes_it(tmp_path: Path) -> None:
    """The event loop makes the blob, and would wait for a file system that stands still."""
    made = blob(tmp_path)
    assert list(tmp_path.iterdir()) == []
    made.append(DATA)
    made.finish()
    assert (tmp_path / "blob").read_bytes() == DATA
    made.close()
    unused = Blob(tmp_path / "unused", digest(b""), 0)
    unused.finish()
    assert unused.read_at(memoryview(bytearray(1)), 0, BlobReader(unused)) == 0
    unused.close()
    assert [path.name for path in tmp_path.iterdir()] == ["blob"]


def test_a_reader_follows_the_writer(tmp_path: Path) -> None:
    made = blob(tmp_path)
    thread, got = read_in_thread(made)
    for at in range(0, len(DATA), 1000):
        made.append(DATA[at : at + 1000])
    made.finish()
    thread.join(5)
    assert got == [DATA]
    made.close()


def test_a_reader_learns_of_a_failure(tmp_path: Path) -> None:
    made = blob(tmp_path)
    thread, got = read_in_thread(made)
    made.append(DATA[:10])
    made.fail(NotFound("gone"))
    thread.join(5)
    assert isinstance(got[0], NotFound)
    made.close()


def test_a_reader_is_stopped_alone(tmp_path: Path) -> None:
    made = blob(tmp_path)
    stopped, going = BlobReader(made), BlobReader(made)
    threading.Timer(0.01, stopped.stop).start()
    with pytest.raises(Unavailable):
        stopped.read(1)
    made.append(DATA)
    made.finish()
    assert going.read() == DATA
    made.close()


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
    made.close()


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
    made.close()


@pytest.mark.parametrize("data", [DATA[:-1], DATA + b"x", DATA[::-1]])
def test_a_blob_is_verified(tmp_path: Path, data: bytes) -> None:
    made = blob(tmp_path)

    def fill() -> None:
        made.append(data)
        made.finish()

    with pytest.raises(DataLoss, match=made.digest):
        fill()
    made.close()


def test_a_blob_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(DATA)
    made = Blob(file, digest(DATA), len(DATA), complete=True)
    assert BlobReader(made).read() == DATA
    made.close()
    assert file.exists()


def test_a_blob_leaves_the_disk_its_reserve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several may be on their way, each of which would fit alone."""
    blob = Blob(tmp_path / "blob", digest(b""), 10)
    monkeypatch.setattr(disk_reserve, "_RESERVE_BYTES", 1 << 60)
    monkeypatch.setattr(disk_reserve, "_RESERVE_SHARE", 1)
    with pytest.raises(ResourceExhausted, match="left on the disk"):
        blob.append(b"x")
    assert not blob.path.exists()
    blob.close()
    with pytest.raises(ResourceExhausted, match="left on the disk"):
        Documents(tmp_path / "sha256").put(b"{}")


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
    if compress is not bytes or not data.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd")):
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
    assert "damaged" in text or "window" in text


class Turns:
    """Somebody who is asked to take turns."""

    def __init__(self) -> None:
        self.took: list[threading.Lock] = []

    def take(self, turn: threading.Lock) -> None:
        assert turn.acquire(blocking=False)
        self.took.append(turn)


def zstd_frame(data: bytes, window_log: int) -> bytes:
    """A frame of a size that its head does not tell: the decoder makes room for the whole window."""
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(data) + compressor.flush()


@pytest.mark.parametrize(
    ("window_log", "large"), [(20, False), (23, False), (24, True), (27, True)]
)
def test_one_large_window_at_a_time(window_log: int, large: bool) -> None:
    """Also that of a later frame; the turn is over with the data, and with whoever does not want it any more."""
    data = zstandard.compress(b"first") + zstd_frame(bytes(1 << 20), window_log)
    turns = Turns()
    chunks = decompressed(io.BytesIO(data), turns)
    assert next(chunks) == b"first"
    assert not turns.took
    next(chunks)
    assert [turn.locked() for turn in turns.took] == [True] * large
    chunks.close()
    assert b"".join(decompressed(io.BytesIO(data), turns)) == b"first" + bytes(1 << 20)
    assert [turn.locked() for turn in turns.took] == [False] * 2 * large
    assert sum(map(len, decompressed(io.BytesIO(data)))) == 5 + (1 << 20)


def test_a_turn_is_taken_when_the_blob_is_there(tmp_path: Path) -> None:
    """Whoever has it must not wait for a server."""
    turn, blob = threading.Lock(), Blob(tmp_path / "blob", digest(b"ab"), 2)
    blob.append(b"a")
    reader = BlobReader(blob)
    thread = threading.Thread(target=reader.take, args=(turn,))
    thread.start()
    assert not turn.locked()
    blob.append(b"b")
    blob.finish()
    thread.join()
    assert turn.locked()
    waiting = BlobReader(blob)
    waiting.stop()
    with pytest.raises(Unavailable):
        waiting.take(turn)
    blob.close()


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
