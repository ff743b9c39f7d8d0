import struct
import zlib

import pytest

from nodeagent.streaming.spdy_headers import (
    DICTIONARY,
    MAX_BLOCK_BYTES,
    MAX_HEADERS,
    Compressor,
    Decompressor,
    HeaderError,
)


def block(count: int, *texts: bytes) -> bytes:
    """A block with these names and values, whatever they are, as the first of a connection."""
    plain = struct.pack("!I", count) + b"".join(struct.pack("!I", len(t)) + t for t in texts)
    deflate = zlib.compressobj(zdict=DICTIONARY)
    return deflate.compress(plain) + deflate.flush(zlib.Z_SYNC_FLUSH)


def test_the_dictionary_is_the_drafts() -> None:
    # The draft's own check: the DICTID that zlib reports for it.
    assert zlib.adler32(DICTIONARY) == 0xE3C6A7C2
    assert len(DICTIONARY) == 1423


def test_blocks_share_one_context() -> None:
    compressor, decompressor = Compressor(), Decompressor()
    headers = {"streamtype": "error", "port": "8080", "requestid": "ä"}
    blocks = [compressor.encode(headers) for _ in range(3)]
    assert [decompressor.decode(data) for data in blocks] == [headers] * 3
    assert len(blocks[1]) < len(blocks[0])


def test_names_are_lower_case() -> None:
    assert Decompressor().decode(block(1, b"streamType", b"Data")) == {"streamtype": "Data"}


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"x" * 20, id="not zlib"),
        pytest.param(block(1), id="no header where one is announced"),
        pytest.param(block(1, b"a"), id="no value"),
        pytest.param(block(1, b"", b"v"), id="empty name"),
        pytest.param(block(2, b"a", b"v", b"A", b"v"), id="a name twice"),
        pytest.param(block(1, b"a", b"\xff"), id="not UTF-8"),
        pytest.param(block(0, b"a"), id="more than announced"),
        pytest.param(block(MAX_HEADERS + 1), id="too many"),
        pytest.param(block(1, b"a", b"v" * MAX_BLOCK_BYTES), id="too large"),
        pytest.param(block(1, b"a", bytes(100 << 20)), id="a bomb"),
    ],
)
def test_what_is_no_block_is_refused(data: bytes) -> None:
    with pytest.raises(HeaderError):
        Decompressor().decode(data)
