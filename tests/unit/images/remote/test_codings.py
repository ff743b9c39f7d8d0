"""Answers that something on the way has compressed."""

import gzip
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.images.remote.codings import PIECE_BYTES, Decoder, Undecodable, decoder_of


def bare(data: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return stream.compress(data) + stream.flush()


FORMS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "bare": bare,
}


@given(st.binary(max_size=2000), st.sampled_from(sorted(FORMS)), st.integers(1, 100))
def test_any_pieces_are_decoded(data: bytes, form: str, step: int) -> None:
    encoded = FORMS[form](data)
    decoder = Decoder("deflate" if form == "bare" else form)
    pieces = [encoded[at : at + step] for at in range(0, len(encoded), step)]
    assert b"".join(got for piece in pieces for got in decoder.decode(piece)) == data
    decoder.finish()


def test_members_and_padding() -> None:
    encoded = gzip.compress(b"one") + gzip.compress(b"two") + bytes(20)
    decoder = Decoder("gzip")
    pieces = [encoded[at : at + 1] for at in range(len(encoded))]
    assert b"".join(got for piece in pieces for got in decoder.decode(piece)) == b"onetwo"
    decoder.finish()


def test_pieces_are_bounded() -> None:
    """Nothing is decoded before it is taken: 64 MiB of zeros are 64 KiB of gzip."""
    pieces = Decoder("gzip").decode(gzip.compress(bytes(64 << 20)))
    assert {len(next(pieces)) for _ in range(3)} == {PIECE_BYTES}


@pytest.mark.parametrize("data", [b"no gzip at all", gzip.compress(b"a")[:-9] + bytes(9)])
def test_damage(data: bytes) -> None:
    with pytest.raises(Undecodable, match="damaged gzip"):
        list(Decoder("gzip").decode(data))


@pytest.mark.parametrize("name", ["gzip", "deflate"])
@pytest.mark.parametrize("length", [0, 5])
def test_what_is_cut_off(name: str, length: int) -> None:
    decoder = Decoder(name)
    list(decoder.decode(FORMS[name](b"content" * 10)[:length]))
    with pytest.raises(Undecodable, match="cut off"):
        decoder.finish()


@pytest.mark.parametrize("headers", [[], [""], ["identity"], ["Identity, "]])
def test_no_coding(headers: list[str]) -> None:
    assert decoder_of(headers) is None


@pytest.mark.parametrize("headers", [["br"], ["zstd"], ["gzip, gzip"], ["gzip", "br"]])
def test_other_codings_are_named(headers: list[str]) -> None:
    with pytest.raises(Undecodable, match=", ".join(headers)):
        decoder_of(headers)


@pytest.mark.parametrize("nothing", ["members", "blocks", "padding"])
def test_what_is_nothing_comes_to_an_end(nothing: str) -> None:
    """No bound on the length of what is decoded would be met."""
    empty = gzip.compress(b"")
    encoded = {
        "members": empty * 20_000,
        "blocks": empty[:10] + b"\0\0\0\xff\xff" * 100_000,
        "padding": empty + bytes(400_000),
    }
    with pytest.raises(Undecodable, match="without content"):
        list(Decoder("gzip").decode(encoded[nothing]))


def test_a_little_of_nothing_is_in_nobody_s_way() -> None:
    decoder = Decoder("gzip")
    encoded = gzip.compress(b"") * 5000 + gzip.compress(b"x")
    assert b"".join(decoder.decode(encoded * 4)) == b"xxxx"
