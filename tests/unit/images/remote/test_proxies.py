"""The proxies of the environment, as Go's programs read them."""

import base64
import logging

import pytest
from yarl import URL

from nodeagent.images.remote.proxies import Proxies, Proxy

PROXY = "http://proxy.example:3128"


def proxy_of(url: str, **environment: str) -> str:
    """The URL of the proxy for a URL; empty for none."""
    proxy = Proxies(environment).of(URL(url))
    return str(proxy.url).rstrip("/") if proxy else ""


def test_each_scheme_has_its_own() -> None:
    both = {"HTTP_PROXY": "http://one:1", "HTTPS_PROXY": "https://two"}
    assert proxy_of("http://a.b/", **both) == "http://one:1"
    assert proxy_of("https://a.b/", **both) == "https://two"
    assert proxy_of("https://a.b/", HTTP_PROXY=PROXY) == ""
    assert proxy_of("https://a.b/") == ""


def test_upper_case_names_come_first() -> None:
    assert proxy_of("https://a.b/", https_proxy=PROXY) == PROXY
    assert proxy_of("https://a.b/", HTTPS_PROXY=PROXY, https_proxy="http://other") == PROXY
    assert proxy_of("https://a.b/", HTTPS_PROXY="", https_proxy=PROXY) == PROXY
    assert proxy_of("https://a.b/", HTTPS_PROXY=PROXY, no_proxy="a.b") == ""
    assert proxy_of("https://a.b/", HTTPS_PROXY=PROXY, NO_PROXY="c.d", no_proxy="a.b") == PROXY


@pytest.mark.parametrize(
    ("value", "url"),
    [
        ("proxy.example:3128", PROXY),
        ("proxy.example", "http://proxy.example"),
        ("10.0.0.1:3128", "http://10.0.0.1:3128"),
        ("localhost:3128", "http://localhost:3128"),
        ("HTTP://proxy.example:3128/", PROXY),
        ("socks5://proxy.example:1080", "socks5://proxy.example:1080"),
        ("http://[", ""),
        ("http://proxy:port", ""),
    ],
)
def test_values_of_a_proxy(value: str, url: str) -> None:
    assert proxy_of("https://a.b/", HTTPS_PROXY=value) == url


def test_a_malformed_proxy_is_noted_without_its_password(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert proxy_of("https://a.b/", HTTPS_PROXY="http://me:secret@proxy:port") == ""
    assert "HTTPS_PROXY" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("value", "pair"),
    [
        ("http://me:secret@proxy:1", "me:secret"),
        ("me:secret@proxy:1", "me:secret"),
        ("http://me@proxy:1", "me:"),
        ("http://me:s%3Ae%40c%2F%C3%A9@proxy:1", "me:s:e@c/é"),
    ],
)
def test_credentials_of_a_proxy(value: str, pair: str) -> None:
    proxy = Proxies({"HTTPS_PROXY": value}).of(URL("https://a.b/"))
    assert proxy is not None
    assert (str(proxy.url.origin()), proxy.url.user) == ("http://proxy:1", None)
    assert proxy.authorization == f"Basic {base64.b64encode(pair.encode()).decode()}"
    assert "authorization" not in repr(proxy)
    assert Proxy.of(URL("http://proxy:1")).authorization == ""


@pytest.mark.parametrize(
    ("entries", "excepted", "asked"),
    [
        ("example.com", "example.com a.example.com EXAMPLE.com", "badexample.com example.com.de"),
        (".example.com", "a.example.com a.b.example.com", "example.com"),
        ("*.example.com", "a.example.com", "example.com"),
        ("example.com:8443", "example.com:8443 a.example.com:8443", "example.com"),
        ("example.com:443", "example.com", "example.com:8443"),
        ("example.com:", "example.com example.com:5000", "a.b"),
        (" Example.COM , a.b ", "example.com a.b", "c.d"),
        ("bücher.example", "xn--bcher-kva.example a.xn--bcher-kva.example", "bucher.example"),
        ("10.0.0.0/8", "10.1.2.3 10.1.2.3:5000", "11.0.0.1 ten.example"),
        ("10.1.2.3/8", "10.9.9.9", "11.0.0.1"),
        ("10.1.2.3", "10.1.2.3 10.1.2.3:5000", "10.1.2.4"),
        ("10.1.2.3:5000", "10.1.2.3:5000", "10.1.2.3"),
        ("fd00::/8", "[fd12::1] [fd12::1]:5000", "[fe00::1]"),
        ("fd12::1", "[fd12::1] [fd12:0::1]:5000", "[fd12::2]"),
        ("[fd12::1]:5000", "[fd12::1]:5000", "[fd12::1]"),
        ("10.0.0.0/8", "[::ffff:10.1.2.3]", "[::ffff:11.1.2.3]"),
        ("::ffff:10.0.0.0/104", "10.1.2.3 [::ffff:10.1.2.3]", "11.1.2.3"),
        ("10.0.0.0/255.0.0.0", "", "10.1.2.3"),
        ("*", "a.b 10.1.2.3 [fd12::1]", ""),
        ("c.d,*,e.f", "a.b", ""),
        ("*example.com", "", "example.com a.example.com"),
        (",, ,:80,/,[", "", "a.b 10.1.2.3"),
        ("", "localhost 127.0.0.1 127.9.9.9:5000 [::1] LOCALHOST:80", "a.localhost 128.0.0.1"),
    ],
)
def test_exceptions(entries: str, excepted: str, asked: str) -> None:
    environment = {"HTTPS_PROXY": PROXY, "NO_PROXY": entries}
    for host in excepted.split():
        assert proxy_of(f"https://{host}/v2", **environment) == "", host
    for host in asked.split():
        assert proxy_of(f"https://{host}/v2", **environment) == PROXY, host
