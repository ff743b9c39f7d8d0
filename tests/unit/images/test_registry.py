"""What a registry's answers and its host's configuration may not say."""

from pathlib import Path

import pytest
from yarl import URL

from nodeagent.errors import InvalidArgument, RegistryUnavailable
from nodeagent.images.hosts import Host
from nodeagent.images.registry import _redirection, tls_context


@pytest.mark.parametrize(
    "location", ["https://a.\udc94/", "https://a.é/", "/\udcff", "//[", "ftp://a/", "https://u@a/"]
)
def test_a_malformed_redirection_is_refused(location: str) -> None:
    with pytest.raises(RegistryUnavailable, match="redirects to a"):
        _redirection(URL("https://a.b/v2"), location)


def test_a_file_that_cannot_be_is_named() -> None:
    with pytest.raises(InvalidArgument, match="null byte"):
        tls_context(Host(root="https://a.b/v2", ca=(Path("/a\0b"),)))
