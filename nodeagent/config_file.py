"""The configuration from TOML files and the command line, and as a file again.

Sources, the later one wins key by key: the defaults, the file, `config.d/*.toml` beside it in the order of their names,
the command line. A key that is unknown or ill-typed is refused with file, line and key.
"""

import ipaddress
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from nodeagent.config import Config, Table, parse_rlimit, split_address
from nodeagent.errors import InvalidArgument

DEFAULT_PATH = Path("/etc/nodeagent/config.toml")
SOCKET_PATH_BYTES = 107

Document = Mapping[str, Any]
Key = tuple[str, ...]


class Source(msgspec.Struct, frozen=True):
    """A document and where it came from; text is empty for the command line."""

    name: str
    text: str
    document: Document

    def where(self, key: Key) -> str:
        if not self.text:
            return self.name
        return f"{self.name}:{_line_of(self.text, key)}"


def load(path: Path | None, overrides: Document) -> Config:
    """The effective configuration. Raises `InvalidArgument`, and `FileNotFoundError` for an explicit `path`.

    overrides: what the command line sets, nested as in a file.
    """
    sources = [
        *_read_files(path or DEFAULT_PATH, required=path is not None),
        Source("command line", "", overrides),
    ]
    merged: dict[str, Any] = {}
    for source in sources:
        _convert(source.document, source)
        _merge(merged, source.document)
    config = msgspec.convert(merged, Config)
    for key, problem in _problems(config):
        setter = next((s for s in reversed(sources) if _has(s.document, key)), None)
        where = setter.where(key) if setter else "default"
        raise InvalidArgument(f"{where}: {'.'.join(key)}: {problem}")
    return config


def _read_files(path: Path, *, required: bool) -> Iterator[Source]:
    if required or path.exists():
        yield _read(path)
    for drop_in in sorted((path.parent / "config.d").glob("*.toml")):
        yield _read(drop_in)


def _read(path: Path) -> Source:
    try:
        text = path.read_text(encoding="utf-8")
        return Source(str(path), text, tomllib.loads(text))
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{path}: not TOML: {error}") from None


def _convert(document: Document, source: Source) -> None:
    try:
        msgspec.convert(document, Config)
    except msgspec.ValidationError as error:
        problem, key = _explain(error)
        raise InvalidArgument(f"{source.where(key)}: {'.'.join(key)}: {problem}") from None


def _explain(error: msgspec.ValidationError) -> tuple[str, Key]:
    """What msgspec says about a document, with the path of the key at the end of the text."""
    text, _, path = str(error).partition(" - at `$")
    key = tuple(part.partition("[")[0] for part in path.rstrip("`").split(".") if part)
    if text.startswith("Object contains unknown field `"):
        return "unknown key", (*key, text.split("`")[1])
    return text[0].lower() + text[1:].replace("`", ""), key


def _line_of(text: str, key: Key) -> int:
    """The line where `key` is set: the one after the last head of the file that parses and lacks the key."""
    lines = text.splitlines(keepends=True)
    last = 0
    for count in range(1, len(lines) + 1):
        try:
            document = tomllib.loads("".join(lines[:count]))
        except tomllib.TOMLDecodeError:
            continue
        if _has(document, key):
            break
        last = count
    return last + 1


def _has(document: Document, key: Key) -> bool:
    value: Any = document
    for part in key:
        if not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return True


def _merge(into: dict[str, Any], document: Document) -> None:
    """Tables key by key, everything else replaced."""
    for key, value in document.items():
        if isinstance(value, dict):
            _merge(into.setdefault(key, {}), value)
        else:
            into[key] = value


# --- what types alone do not say ------------------------------------------------------------------------------------


def _problems(config: Config) -> Iterator[tuple[Key, str]]:
    for key, check in _CHECKS.items():
        value: Any = config
        for part in key:
            value = getattr(value, part)
        if problem := check(value):
            yield key, problem
    streaming = config.streaming
    if bool(streaming.tls_cert) != bool(streaming.tls_key):
        missing = "tls_key" if streaming.tls_cert else "tls_cert"
        yield ("streaming", missing), "a certificate and its key go together"
    if streaming.client_ca and not streaming.tls_cert:
        yield ("streaming", "client_ca"), "needs tls_cert and tls_key"
    if not streaming.tls_cert and not _is_loopback(streaming.address):
        yield ("streaming", "address"), "beyond loopback it needs tls_cert and tls_key"


def _directory(value: str) -> str:
    return "" if value.startswith("/") and "\0" not in value else "must be an absolute path"


def _file(value: str) -> str:
    return _directory(value) if value else ""


def _listen(value: str) -> str:
    path = value.removeprefix("unix://")
    if path == value or not path.startswith("/"):
        return "must be unix:///path"
    if len(path.encode()) > SOCKET_PATH_BYTES:
        return f"a socket's path has at most {SOCKET_PATH_BYTES} bytes"
    return ""


def _address(value: str) -> str:
    try:
        ipaddress.ip_address(split_address(value)[0])
    except ValueError:
        return "must be ADDRESS:PORT with a numeric address"
    return ""


def _is_loopback(value: str) -> bool:
    return ipaddress.ip_address(split_address(value)[0]).is_loopback


def _optional_address(value: str) -> str:
    return _address(value) if value else ""


def _subnet(version: int) -> Callable[[str], str]:
    def check(value: str) -> str:
        try:
            network = ipaddress.ip_network(value) if value else None
        except ValueError as error:
            return str(error)
        if network and (network.version != version or network.num_addresses < 4):
            return f"must be an IPv{version} network of 4 addresses or more"
        return ""

    return check


def _optional_rlimit(value: str) -> str:
    try:
        soft, hard = parse_rlimit(value) if value else (0, 0)
    except ValueError:
        return 'must be "soft:hard", numbers or unlimited'
    if min(soft, hard) < -1 or (hard != -1 and not 0 <= soft <= hard):
        return "the soft limit is above the hard one"
    return ""


def _absolute_paths(value: tuple[str, ...]) -> str:
    return next(filter(None, map(_directory, value)), "")


def _handlers(value: tuple[str, ...]) -> str:
    valid = all(name and name.replace("-", "").replace(".", "").isalnum() for name in value)
    return "" if valid else "names have letters, digits, - and ."


_CHECKS: dict[Key, Callable[[Any], str]] = {
    ("root",): _directory,
    ("state",): _directory,
    ("listen",): _listen,
    ("metrics",): _optional_address,
    ("certs_dir",): _directory,
    ("handlers",): _handlers,
    ("absent_mount_sources_to_reject",): _absolute_paths,
    ("cdi", "directories"): _absolute_paths,
    ("cdi", "hook_programs"): _absolute_paths,
    ("streaming", "address"): _address,
    ("streaming", "tls_cert"): _file,
    ("streaming", "tls_key"): _file,
    ("streaming", "client_ca"): _file,
    ("cgroup", "parent"): _file,
    ("network", "subnet4"): _subnet(4),
    ("network", "subnet6"): _subnet(6),
    ("rlimits", "nofile"): _optional_rlimit,
    ("rlimits", "nproc"): _optional_rlimit,
    ("rlimits", "core"): _optional_rlimit,
    ("rlimits", "memlock"): _optional_rlimit,
    ("seccomp", "default_profile"): _file,
}


# --- printing -------------------------------------------------------------------------------------------------------


def dumps(config: Config) -> str:
    """The configuration as TOML, which `load` reads back to the same."""
    return "\n".join(_lines(config)) + "\n"


def _lines(table: Table, name: str = "") -> Iterator[str]:
    if name:
        yield f"\n[{name}]"
    for field in table.__struct_fields__:
        value = getattr(table, field)
        if isinstance(value, Table):
            yield from _lines(value, field)
        else:
            yield f"{field} = {to_toml(value)}"


def to_toml(value: object) -> str:
    """A value of a key as TOML writes it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(to_toml, value))}]"
    # A JSON string is a TOML basic string: the same escapes, and DEL is the only character TOML alone forbids.
    return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
