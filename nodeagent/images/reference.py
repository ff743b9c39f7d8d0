"""Names of images: parsing, normalisation, and refusal of what is no name.

The rules are those of the common grammar (distribution/reference, ``normalize.go``): a short name is one of
docker.io, a tag beside a digest is dropped, and 64 hexadecimal digits are an image's ID, never a name.
"""

import re
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Literal
from urllib.parse import urlsplit

from nodeagent.errors import InvalidArgument

DEFAULT_DOMAIN = "docker.io"
DEFAULT_TAG = "latest"
_DOMAIN_ALIASES = frozenset(("index.docker.io", "registry-1.docker.io"))
_OFFICIAL = "library/"
_MAX_DOMAIN = 253 + len(":65535")  # RFC 1035, 2.3.4
_MAX_PATH = 255  # without the domain, in newer versions of the grammar
_MAX_TEXT = _MAX_DOMAIN + 1 + _MAX_PATH + 1 + 128 + 1 + 71

# crictl shows 13 digits; much shorter ones could be words that somebody uses as a name.
MIN_ID_PREFIX = 6

_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_DOMAIN = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]{{1,5}})?")
_COMPONENT = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_PATH = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_ID = re.compile(r"[0-9a-f]{64}")
_ID_PREFIX = re.compile(rf"(?:sha256:)?([0-9a-f]{{{MIN_ID_PREFIX},64}})")

Kind = Literal["image", "security profile"]  # as errors call what a reference is for


class _Malformed(Exception):
    """The reason why a text is no reference."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A normalised name, of which either `tag` or `digest` is empty."""

    domain: str
    path: str
    tag: str
    digest: str

    @property
    def name(self) -> str:
        return f"{self.domain}/{self.path}"

    @property
    def version(self) -> str:
        """The tag or digest that names the manifest within the repository."""
        return self.digest or self.tag

    def __str__(self) -> str:
        return f"{self.name}@{self.digest}" if self.digest else f"{self.name}:{self.tag}"


def parse(text: str, kind: Kind = "image") -> Reference:
    """Parse and normalise what a user wrote. Raises `InvalidArgument`."""
    if len(text) > _MAX_TEXT:
        raise InvalidArgument(f'{kind} "{text[:64]}…": longer than {_MAX_TEXT} characters')
    try:
        return _parsed(text)
    except _Malformed as error:
        raise InvalidArgument(f'{kind} "{text}": {error}') from None


def _parsed(text: str) -> Reference:
    if _ID.fullmatch(text):
        raise _Malformed("this is an ID, not a name")
    rest, at, digest = text.partition("@")
    if at and not is_digest(digest):
        raise _Malformed(f'"{digest}" is not a digest "sha256:" and 64 hex digits')
    rest, tag = _split_tag(rest)
    domain, path = _split_domain(rest)
    _check(domain, path, tag)
    if digest:
        return Reference(domain, path, "", digest)
    return Reference(domain, path, DEFAULT_TAG if tag is None else tag, "")


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None


def id_prefix(text: str) -> str | None:
    """The hex digits that `text` may abbreviate an image's ID to, or be it whole; None if it can't."""
    match = _ID_PREFIX.fullmatch(text)
    return match[1] if match else None


def _split_tag(text: str) -> tuple[str, str | None]:
    """The part after the last colon, unless that colon belongs to the domain's port."""
    name, colon, tag = text.rpartition(":")
    if not colon or "/" in tag:
        return text, None
    return name, tag


def _split_domain(name: str) -> tuple[str, str]:
    first, slash, rest = name.partition("/")
    if not slash or not _is_domain(first):
        first, rest = DEFAULT_DOMAIN, name
    if first in _DOMAIN_ALIASES:
        first = DEFAULT_DOMAIN
    if first == DEFAULT_DOMAIN and "/" not in rest:
        rest = _OFFICIAL + rest
    return first, rest


def _is_domain(component: str) -> bool:
    """Whether a part is a host: repositories are lower-case and have no colon, all else before a slash is a host."""
    return (
        "." in component
        or ":" in component
        or component == "localhost"
        or component != component.lower()
    )


def _check(domain: str, path: str, tag: str | None) -> None:
    if not _is_address(domain):
        raise _Malformed(f'"{domain}" is not a registry host')
    if not _PATH.fullmatch(path):
        hint = "; it must be lower-case" if path != path.lower() else ""
        raise _Malformed(f'"{path}" is not a repository{hint}')
    if len(domain) > _MAX_DOMAIN or len(path) > _MAX_PATH:
        raise _Malformed(f"the repository is longer than {_MAX_PATH} characters")
    if tag is not None and not _TAG.fullmatch(tag):
        raise _Malformed(f'"{tag}" is not a tag')


def _is_address(domain: str) -> bool:
    """Whether a text is a host name or an IP address, with or without a port."""
    if not _DOMAIN.fullmatch(domain):
        return False
    try:
        parts = urlsplit(f"//{domain}")
        return parts.port != 0 and (domain[0] != "[" or bool(IPv6Address(parts.hostname or "")))
    except ValueError:
        return False
