"""What a registry's answers and its host's configuration may not say."""

from pathlib import Path

import pytest
from yarl import URL

from nodeagent.errors import InvalidArgument, RegistryUnavailable
from nodeagent.images.client import Tls, _redirection, open_session
from nodeagent.images.destinations import Scope
from nodeagent.images.hosts import Host
from nodeagent.images.manifest import Descriptor
from nodeagent.images.reference import parse
from nodeagent.images.source import Source


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
