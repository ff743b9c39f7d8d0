"""Credentials for registries: the host that they belong to, and the answer to a registry's challenge.

A secret is sent only to the host that it belongs to, and to the token service that this very host names. It is never
in a text, a log or a ``repr``.
"""

import base64
import binascii
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec

from nodeagent.errors import InvalidArgument, PermissionDenied
from nodeagent.images.remote.hosts import Host, http_url, normal_name

_TOKEN = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"
_SCHEME = re.compile(rf"({_TOKEN})(?:\s+|(?=,)|$)")
_PARAMETER = re.compile(rf'({_TOKEN})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')
_MAX_CHALLENGE = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Auth:
    """The credentials in a PullImage; empty fields are not set. auth: base64 of ``username:password``.

    identity_token: an OAuth 2 refresh token; registry_token: a bearer token as it is.
    """

    username: str = ""
    password: str = field(default="", repr=False)
    auth: str = field(default="", repr=False)
    server_address: str = ""
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Credentials:
    """The secrets that may be sent to one host; none of them for an anonymous request."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)

    @property
    def basic(self) -> str:
        """The value of an Authorization header; empty without a name."""
        if not self.username:
            return ""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


ANONYMOUS = Credentials()


class Challenge(NamedTuple):
    """A challenge: one way to be authorised, from a WWW-Authenticate header; names are lower-case."""

    scheme: str
    parameters: dict[str, str]


class TokenRequest(NamedTuple):
    """A request to a token service: a GET with `query`, or a POST with `form`."""

    realm: str
    query: dict[str, str]
    form: dict[str, str]
    authorization: str


class _TokenAnswer(msgspec.Struct):
    token: str | None = None
    access_token: str | None = None


def credentials(auth: Auth | None, domain: str, host: Host) -> Credentials:
    """The credentials that `host` may see for an image of the registry `domain`.

    They belong to the host that the caller names, else to the registry of the image; a mirror gets none. Raises
    `InvalidArgument`.
    """
    if auth is None:
        return ANONYMOUS
    home = _home(auth.server_address or domain)
    is_registry = not host.mirror and home == normal_name(domain)
    if host.name != home and not is_registry:
        return ANONYMOUS
    username, password = auth.username, auth.password
    if auth.auth and not username:
        username, password = _decoded(auth.auth)
    if not _is_one_word(auth.registry_token):
        raise InvalidArgument("auth: registry_token is no token")
    return Credentials(username, password, auth.identity_token, auth.registry_token)


def _home(address: str) -> str:
    try:
        return normal_name(address)
    except ValueError:  # it may have a password in it
        raise InvalidArgument("auth: server_address is no address of a registry") from None


def parse_challenges(headers: Iterable[str]) -> list[Challenge]:
    """All challenges of an answer (RFC 9110, 11.6.1); a malformed one ends the list."""
    challenges: list[Challenge] = []
    for header in headers:
        text = header[:_MAX_CHALLENGE].replace("\t", " ")
        if not text.isprintable():
            break
        at = 0
        while (at := _after_separators(text, at)) < len(text):
            if challenges and (match := _PARAMETER.match(text, at)):
                value = match[3] or re.sub(r"\\(.)", r"\1", match[2] or "")
                challenges[-1].parameters.setdefault(match[1].lower(), value)
            elif match := _SCHEME.match(text, at):
                challenges.append(Challenge(match[1].lower(), {}))
            else:
                break
            at = match.end()
    return challenges


def token_request(
    challenge: Challenge, credentials: Credentials, scope: str, *, root: str
) -> TokenRequest:
    """The request to the token service that the registry at `root` names. Raises `PermissionDenied`."""
    realm = challenge.parameters.get("realm", "")
    _check_realm(realm, root)
    query = {"scope": challenge.parameters.get("scope") or scope}
    if service := challenge.parameters.get("service"):
        query["service"] = service
    if credentials.identity_token:
        form = {
            "grant_type": "refresh_token",
            "refresh_token": credentials.identity_token,
            "client_id": "nodeagent",
        }
        return TokenRequest(realm, {}, form | query, "")
    if credentials.username:
        query["account"] = credentials.username
    return TokenRequest(realm, query, {}, credentials.basic)


def parse_token(body: bytes) -> str:
    """The bearer token in a token service's answer. Raises `PermissionDenied`."""
    try:
        answer = msgspec.json.decode(body, type=_TokenAnswer)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise PermissionDenied("the token service's answer is malformed") from None
    token = answer.token or answer.access_token or ""
    if not token or not _is_one_word(token):
        raise PermissionDenied("the token service's answer has no token")
    return token


def _is_one_word(text: str) -> bool:
    """Whether a text can be a part of an Authorization header."""
    return text.isascii() and text.isprintable() and " " not in text


def _after_separators(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t,":
        at += 1
    return at


def _check_realm(realm: str, root: str) -> None:
    try:
        if http_url(realm).scheme in ("https", urlsplit(root).scheme):
            return
    except ValueError:
        pass
    raise PermissionDenied(f"{realm[:200]!a} is no token service to send credentials to")


def _decoded(auth: str) -> tuple[str, str]:
    try:
        # Some tools wrap lines; Go's decoder ignores their ends as well.
        joined = auth.translate({ord("\r"): None, ord("\n"): None})
        text = base64.b64decode(joined, validate=True).decode()
    except (binascii.Error, ValueError):
        raise InvalidArgument("auth: not base64 of a name and a password") from None
    username, colon, password = text.partition(":")
    if not colon:
        raise InvalidArgument("auth: not base64 of a name and a password")
    return username, password.rstrip("\0")
