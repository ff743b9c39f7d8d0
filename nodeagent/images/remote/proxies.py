"""The proxy for a URL: HTTP_PROXY, HTTPS_PROXY and NO_PROXY as Go's programs read them.

One drop-in file sets them for everything on a node, so they mean here what they mean to the kubelet and to every other
runtime (golang.org/x/net/http/httpproxy): the upper-case names come first; NO_PROXY lists hosts and domains, with or
without a port, a leading dot or "*.", addresses, networks, or "*"; this machine itself is never asked through a proxy.
"""

import base64
import ipaddress
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import unquote

from yarl import URL

log = logging.getLogger(__name__)

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_Exception = Callable[[str, str, _Address | None], bool]  # host, port, and the host as an address


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy. url: without the name and password that it may have; authorization: these, for Proxy-Authorization."""

    url: URL
    authorization: str = field(default="", repr=False)

    @classmethod
    def of(cls, url: URL) -> Self:
        if url.raw_user is None and url.raw_password is None:
            return cls(url)
        pair = f"{unquote(url.raw_user or '')}:{unquote(url.raw_password or '')}".encode()
        return cls(url.with_user(None), f"Basic {base64.b64encode(pair).decode()}")


class Proxies:
    """The proxies that the environment named when the agent started."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._proxies = {
            "http": _parsed(environment, "HTTP_PROXY"),
            "https": _parsed(environment, "HTTPS_PROXY"),
        }
        self._exceptions = list(_exceptions(_value(environment, "NO_PROXY")))

    def of(self, url: URL) -> Proxy | None:
        proxy = self._proxies.get(url.scheme)
        if proxy is None or self._is_excepted((url.raw_host or "").lower(), str(url.port)):
            return None
        return proxy

    def _is_excepted(self, host: str, port: str) -> bool:
        address = _address(host)
        if host == "localhost" or (address is not None and address.is_loopback):
            return True
        return any(excepts(host, port, address) for excepts in self._exceptions)


def _value(environment: Mapping[str, str], name: str) -> str:
    return environment.get(name) or environment.get(name.lower()) or ""


def _parsed(environment: Mapping[str, str], name: str) -> Proxy | None:
    """Parse a proxy: one without a scheme uses HTTP, and a text that is no URL is ignored."""
    text = _value(environment, name)
    if not text:
        return None
    try:
        url = URL(text if "://" in text else f"http://{text}")
        if url.host:
            return Proxy.of(url)
    except ValueError:
        pass
    log.warning("%s is not the URL of a proxy; ignored", name)  # it may have a password in it
    return None


def _exceptions(text: str) -> Iterator[_Exception]:
    for part in text.lower().split(","):
        entry = part.strip()
        if entry == "*":
            yield lambda _host, _port, _address: True
        elif (network := _network(entry)) is not None:
            yield _of_network(network)
        else:
            host, port = _split(entry)
            if (address := _address(host)) is not None and "%" not in host:
                yield _of_address(address, port)
            elif host:
                yield _of_domain(host, port)


def _split(entry: str) -> tuple[str, str]:
    """Split "host:port" or "[address]:port"; any other text is the host as a whole."""
    host, colon, port = entry.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        return host[1:-1], port
    return (host, port) if colon and ":" not in host else (entry, "")


def _of_network(network: _Network) -> _Exception:
    def excepts(_host: str, _port: str, address: _Address | None) -> bool:
        return address is not None and address in network

    return excepts


def _of_address(excepted: _Address, wanted_port: str) -> _Exception:
    def excepts(_host: str, port: str, address: _Address | None) -> bool:
        return address == excepted and wanted_port in ("", port)

    return excepts


def _of_domain(entry: str, wanted_port: str) -> _Exception:
    """Whether a host is of a domain: itself or below it; with a dot before the domain, only below it."""
    suffix = _ascii(entry.removeprefix("*") if entry.startswith("*.") else entry)
    suffix, whole = (suffix, "") if suffix.startswith(".") else (f".{suffix}", suffix)

    def excepts(host: str, port: str, _address: _Address | None) -> bool:
        return (host.endswith(suffix) or host == whole != "") and wanted_port in ("", port)

    return excepts


def _ascii(name: str) -> str:
    """A name as it is looked up; each label is encoded by itself, as the one before a leading dot is empty."""
    try:
        return ".".join(
            label if label.isascii() else label.encode("idna").decode() for label in name.split(".")
        )
    except UnicodeError:
        return name


def _network(text: str) -> _Network | None:
    _, slash, bits = text.partition("/")
    try:
        network = ipaddress.ip_network(text, strict=False) if slash and bits.isdigit() else None
    except ValueError:
        return None
    mapped = network.network_address.ipv4_mapped if network and network.version == 6 else None
    if network is None or mapped is None or network.prefixlen < 96:
        return network
    return ipaddress.ip_network(f"{mapped}/{network.prefixlen - 96}")


def _address(text: str) -> _Address | None:
    """The address in a text; an IPv4 address inside of an IPv6 one counts as the IPv4 address."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
