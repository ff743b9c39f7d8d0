"""The hosts that a registry's images are fetched from: ``certs.d/<host>/hosts.toml``, in containerd's layout and keys.

Hosts are tried in the order of the file, the registry itself last. The file is read for each pull, so that a change
needs no restart. A mistake in it is an `InvalidArgument` that names the file, the host and the key; an unknown key may
be a newer containerd's, and is logged. A directory without the file may have certificates in Docker's layout:
``*.crt`` of authorities, ``*.cert`` and ``*.key`` of the node itself.
"""

import json
import logging
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import msgspec
from yarl import URL

from nodeagent.errors import InvalidArgument
from nodeagent.images.reference import DEFAULT_DOMAIN

DOCKER_HUB = "registry-1.docker.io"
DIAL_SECONDS = 10.0

_ANY = "_default"
_HUB_NAMES = frozenset((DEFAULT_DOMAIN, "index.docker.io", DOCKER_HUB))
_PORTS = {"http": 80, "https": 443}
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\U0010ffff]*")
_DURATION = re.compile(r"(?:[0-9]+(?:\.[0-9]+)?(?:h|m|s|ms))+")
_DURATION_PART = re.compile(r"([0-9.]+)(ms|h|m|s)")
_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One server of the distribution API. root: of the API, as ``https://host:port/v2``; proxy is empty for none.

    resolve: trusted to say what a tag means; pull: asked for content by digest; mirror: not the registry itself.
    """

    root: str
    resolve: bool = True
    pull: bool = True
    mirror: bool = False
    ca: tuple[Path, ...] = ()
    client: tuple[tuple[Path, Path | None], ...] = ()
    skip_verify: bool = False
    headers: tuple[tuple[str, str], ...] = ()
    dial_seconds: float = DIAL_SECONDS
    proxy: str = ""

    @property
    def name(self) -> str:
        return normal_name(self.root)


class _Table(msgspec.Struct, kw_only=True):
    """The table of a host in hosts.toml."""

    capabilities: list[Literal["pull", "resolve", "push", "referrers"]] = []
    ca: str | list[str] = []
    client: str | list[str | list[str]] = []
    skip_verify: bool = False
    header: dict[str, str | list[str]] = {}
    override_path: bool = False
    dial_timeout: str = ""
    proxy: str = ""


class _File(_Table, kw_only=True):
    """The keys beside `host` are those of the server."""

    server: str = ""
    host: dict[str, Any] = {}


T = TypeVar("T")
Table = TypeVar("Table", bound=_Table)

log = logging.getLogger(__name__)


def hosts_of(domain: str, directory: Path) -> list[Host]:
    """The hosts for the images of a registry, in the order in which they are to be tried."""
    file = _find(domain, directory)
    hosts = list(_read(file, domain)) if file else [_plain(domain, directory)]
    first: dict[str, Host] = {}
    for host in hosts:
        first.setdefault(host.root, host)
    return list(first.values())


def normal_name(url: str) -> str:
    """Host and port of a URL or a bare address, without a scheme's own port; Docker Hub has one name."""
    parts = urlsplit(url if "://" in url else f"https://{url}")
    name = (parts.hostname or "").lower()
    if name in _HUB_NAMES:
        return DEFAULT_DOMAIN
    return name if parts.port in (None, _PORTS.get(parts.scheme)) else f"{name}:{parts.port}"


def http_url(text: str, base: URL | None = None) -> URL:
    """Parse the URL of a server, kept byte for byte; it may be relative to `base`.

    Raises `ValueError`.
    """
    if not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("has characters that no URL has")
    url = URL(text, encoded=True) if base is None else base.join(URL(text, encoded=True))
    if url.scheme not in _PORTS or not _is_host(url.host) or not url.port or "@" in url.authority:
        raise ValueError('not "https://host" or "http://host"')
    return url


def _is_host(name: str | None) -> bool:
    """Whether a text is a host: not empty, and without what a proxy might decode; addresses may have a zone."""
    return name is not None and name != "" and ("%" not in name or ":" in name)


def is_loopback(name: str) -> bool:
    """Whether a host's name or address is this machine's loopback, without resolving it."""
    return name in ("localhost", "::1") or re.fullmatch(r"127(\.[0-9]+){3}", name) is not None


def _find(domain: str, directory: Path) -> Path | None:
    files = (directory / name / "hosts.toml" for name in (*_names(domain), _ANY))
    return next((file for file in files if file.is_file()), None)


def _names(domain: str) -> tuple[str, str]:
    """The directories' names for a registry: ``host_5000_`` is for file systems without colons."""
    return re.sub(r":([0-9]+)$", r"_\1_", domain), domain


def _plain(domain: str, directory: Path) -> Host:
    """The registry itself, with the certificates of its directory."""
    folders = (directory / name for name in _names(domain))
    files = next((sorted(folder.iterdir()) for folder in folders if folder.is_dir()), [])
    pairs = [(path, path.with_suffix(".key")) for path in files if path.suffix == ".cert"]
    return Host(
        root=_default_root(domain),
        ca=tuple(path for path in files if path.suffix == ".crt"),
        client=tuple((certificate, key) for certificate, key in pairs if key in files),
    )


def _read(file: Path, domain: str) -> Iterator[Host]:
    try:
        document = tomllib.loads(file.read_text())
    except OSError as error:  # of the disk; a read that fails does not name its file
        raise OSError(error.errno, error.strerror, str(file)) from None
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{file}: {error}") from None
    whole = _convert(document, _File, str(file))
    for url, table in whole.host.items():
        where = f'{file}: host "{url}"'
        yield _host(url, _convert(table, _Table, where), where, file.parent, mirror=True)
    # A server for all registries is not the one that an image's credentials belong to.
    stand_in = bool(whole.server) and file.parent.name == _ANY
    server = whole.server or _default_root(domain)
    yield _host(server, whole, f"{file}: server", file.parent, mirror=stand_in)


def _host(url: str, table: _Table, where: str, base: Path, *, mirror: bool = False) -> Host:
    return Host(
        root=_root(url, table.override_path, where),
        resolve=not table.capabilities or "resolve" in table.capabilities,
        pull=not table.capabilities or "pull" in table.capabilities,
        mirror=mirror,
        ca=tuple(base / path for path in _listed(table.ca)),
        client=tuple(_pair(entry, base, where) for entry in _listed(table.client)),
        skip_verify=table.skip_verify,
        headers=tuple(_headers(table.header, where)),
        dial_seconds=_seconds(table.dial_timeout, where) if table.dial_timeout else DIAL_SECONDS,
        proxy=_root(table.proxy, True, f"{where}: proxy") if table.proxy else "",
    )


def _default_root(domain: str) -> str:
    """The default URL: plain HTTP on a port of the loopback interface, where no one can listen in; else HTTPS."""
    if domain == DEFAULT_DOMAIN:
        return f"https://{DOCKER_HUB}/v2"
    parts = urlsplit(f"https://{domain}")
    plain = is_loopback(parts.hostname or "") and parts.port not in (None, 443)
    scheme = "http" if plain else "https"
    return f"{scheme}://{domain}/v2"


def _root(url: str, as_it_is: bool, where: str) -> str:
    """The root of the API below which repositories are."""
    try:
        parts = urlsplit(str(http_url(url if "://" in url else f"https://{url}")))
    except ValueError as error:
        raise InvalidArgument(f'{where}: "{url}": {error}') from None
    if parts.query:
        raise InvalidArgument(f'{where}: "{url}" is not "https://host" or "http://host"')
    netloc = DOCKER_HUB if parts.netloc in _HUB_NAMES else parts.netloc
    path = parts.path.rstrip("/")
    if not as_it_is and not path.endswith("/v2"):
        path += "/v2"
    return f"{parts.scheme}://{netloc}{path}"


def _pair(entry: str | list[str], base: Path, where: str) -> tuple[Path, Path | None]:
    """Parse a certificate and its key, which may be in the same file."""
    names = [entry, ""] if isinstance(entry, str) else entry
    if len(names) != 2 or not names[0]:
        raise InvalidArgument(f"{where}: client: {names} is not a certificate and a key")
    return base / names[0], base / names[1] if names[1] else None


def _headers(table: dict[str, str | list[str]], where: str) -> Iterator[tuple[str, str]]:
    for name, values in table.items():
        for value in _listed(values):
            if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
                raise InvalidArgument(f'{where}: header "{name}" is malformed')
            yield name, value


def _seconds(text: str, where: str) -> float:
    """Parse a duration as Go writes it: ``1m30s``, ``500ms``."""
    if not _DURATION.fullmatch(text):
        raise InvalidArgument(f'{where}: dial_timeout: "{text}" is not a duration like "5s"')
    return sum(float(number) * _SECONDS[unit] for number, unit in _DURATION_PART.findall(text))


def _listed(value: str | list[T]) -> list[str | T]:
    return [value] if isinstance(value, str) else [*value]


def _convert(value: object, kind: type[Table], where: str) -> Table:
    try:
        converted = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise InvalidArgument(f"{where}: {error}") from None
    known = [field.encode_name for field in msgspec.structs.fields(kind)]
    for key in value if isinstance(value, dict) else ():
        if key not in known:
            _note_unknown(where, key)
    return converted


@cache
def _note_unknown(where: str, key: str) -> None:
    """Log unknown keys, once for each file, which is read for each pull."""
    log.warning("%s: unknown key %s, ignored", where, json.dumps(key[:100]))
