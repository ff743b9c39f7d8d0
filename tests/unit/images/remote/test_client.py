"""What a registry's answers and its host's configuration may not say."""

import asyncio
import gzip
import ssl
from collections.abc import Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import pytest
from multidict import CIMultiDict
from yarl import URL

from nodeagent.errors import InvalidArgument, RegistryUnavailable
from nodeagent.images.manifest import Descriptor
from nodeagent.images.reference import parse
from nodeagent.images.remote.client import Tls, _redirection, open_session, read_bounded, received
from nodeagent.images.remote.codings import PIECE_BYTES
from nodeagent.images.remote.destinations import Scope
from nodeagent.images.remote.hosts import Host
from nodeagent.images.remote.source import Source


@pytest.mark.parametrize(
    "location",
    [
        "https://a.\udc94/",
        "https://a.é/",
        "/\udcff",
        "//[",
        "ftp://a/",
        "https://u@a/",
    ],
)
def test_a_malformed_redirection_is_refused(location: str) -> None:
    with pytest.raises(RegistryUnavailable, match="redirects to a"):
        _redirection(URL("https://a.b/v2"), location)


async def test_only_urls_that_can_be_asked_are_elsewhere() -> None:
    urls = (
        "http://[",
        "http://%31%30.0.0.1/",
        "ftp://a/",
        "https://a/\n",
        "https://a:x/",
        "https://a/layer",
    )
    layer = Descriptor(digest=f"sha256:{'0' * 64}", size=1, urls=urls)
    async with open_session() as session:
        assert len(Source(session, parse("a"), (), Scope.PRIVATE)._foreign(layer)) == 1


def test_a_file_that_cannot_be_is_named() -> None:
    with pytest.raises(InvalidArgument, match="null byte"):
        Tls.of(Host(root="https://a.b/v2", ca=(Path("/a\0b"),)))


def test_a_file_that_is_malformed_or_missing_is_a_mistake(tmp_path: Path) -> None:
    path = tmp_path / "ca.crt"
    for _ in range(2):
        with pytest.raises(InvalidArgument, match=f"{path}: "):
            Tls.of(Host(root="https://a.b/v2", ca=(path,)))
        path.write_text("no certificate")


def test_a_file_that_cannot_be_read_is_no_mistake() -> None:
    """The kernel's own error, as of a disk that fails, and not one of whoever wrote the name."""
    path = Path("/proc/self/mem")  # reading it at its start is EIO
    with pytest.raises(OSError, match=str(path)) as caught:
        Tls.of(Host(root="https://a.b/v2", ca=(path,)))
    assert not isinstance(caught.value, ssl.SSLError)


class _Content:
    def __init__(self, data: bytes) -> None:
        self._left = [data]

    async def readany(self) -> bytes:
        return self._left.pop() if self._left else b""


def compressed(encoded: bytes) -> aiohttp.ClientResponse:
    """An answer that is read at once."""
    answer = SimpleNamespace(
        status=200,
        headers=CIMultiDict({"Content-Encoding": "gzip"}),
        content_length=None,
        content=_Content(encoded),
        url=URL("http://registry/blob"),
    )
    return cast(aiohttp.ClientResponse, answer)


async def turns_during(reading: Coroutine[Any, Any, bytes]) -> tuple[bytes, int]:
    """What is read, and how often others had their turn meanwhile."""
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(others())
    data = await reading
    task.cancel()
    return data, turns


async def from_offset(response: aiohttp.ClientResponse, offset: int) -> bytes:
    return b"".join([chunk async for chunk in received(response, offset)])


async def test_others_have_their_turns_while_a_start_is_passed_over() -> None:
    """A server that knows no ranges sends all of it again, of which a middle box has made a thousandth."""
    size = 64 << 20
    answer = compressed(gzip.compress(bytes(size) + b"end"))
    data, turns = await turns_during(from_offset(answer, size))
    assert data == b"end"
    assert turns >= size // PIECE_BYTES - 1


async def test_others_have_their_turns_while_small_members_are_read() -> None:
    """Members have 21 bytes each, of which what is left after every one was copied."""
    answer = compressed(gzip.compress(b"x") * 20_000)
    data, turns = await turns_during(read_bounded(answer, 1 << 20))
    assert len(data) == 20_000
    assert turns >= 20_000
