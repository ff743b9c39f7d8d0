"""The agent's configuration: one schema, TOML files, and what the command line overrides.

Sources, the later one wins key by key: the defaults below, the file, `config.d/*.toml` beside it in the order of their
names, the command line. A key that is unknown or ill-typed is refused with file, line and key. The schema is the
documentation: `commented_defaults` prints it.
"""

import ipaddress
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from nodeagent.errors import InvalidArgument

DEFAULT_PATH = Path("/etc/nodeagent/config.toml")
SOCKET_PATH_BYTES = 107

# Not /run/nodeagent, which the first versions had: Calico and old versions of Istio mount /var/run/nodeagent into their
# pods, for a socket of their own, and would find ours there.
DEFAULT_STATE = "/run/nodeagent-cri"

# Where packages, the GPU operator's toolkit container and the driver for dynamic resource allocation put what the
# specifications of NVIDIA's toolkit have as their hooks, under its newer and its older name.
HOOK_PROGRAMS = tuple(
    f"{directory}/{name}"
    for directory in (
        "/usr/bin",
        "/usr/local/bin",
        "/usr/local/nvidia/toolkit",
        "/run/nvidia/toolkit",
        "/var/lib/kubelet/plugins/gpu.nvidia.com",
        "/var/lib/kubelet/plugins/compute-domain.nvidia.com",
    )
    for name in ("nvidia-cdi-hook", "nvidia-ctk")
)

Document = Mapping[str, Any]
Key = tuple[str, ...]
Seconds = Annotated[int, Meta(ge=1, le=86_400)]


def doc(meaning: str) -> Meta:
    return Meta(description=meaning)


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the file."""


class Streaming(Table, frozen=True, kw_only=True):
    address: Annotated[str, doc("where exec, attach and port-forward are served")] = "127.0.0.1:0"
    tls_cert: Annotated[str, doc("PEM file; needed beyond loopback")] = ""
    tls_key: Annotated[str, doc("PEM file of its key")] = ""
    client_ca: Annotated[str, doc("PEM file; clients need a certificate of it")] = ""
    idle_timeout_seconds: Annotated[Seconds, doc("a session without traffic is closed")] = 14_400
    creation_timeout_seconds: Annotated[Seconds, doc("for a client to open all its streams")] = 30


class Cgroup(Table, frozen=True, kw_only=True):
    driver: Annotated[
        Literal["auto", "cgroupfs", "systemd"],
        doc("auto: systemd where it manages a cgroup v2 node, else cgroupfs"),
    ] = "auto"
    parent: Annotated[str, doc("of pods that name none; empty: one of this agent's own")] = ""


class Network(Table, frozen=True, kw_only=True):
    bridge: Annotated[
        str, Meta(max_length=15), doc("its name; empty: derived from the root directory")
    ] = ""
    subnet4: Annotated[
        str, doc("IPv4 addresses of pods; empty: none, also after UpdateRuntimeConfig")
    ] = "10.88.0.0/16"
    subnet6: Annotated[str, doc("IPv6 addresses of pods; empty: none")] = ""
    mtu: Annotated[int, Meta(ge=0, le=65_535), doc("0: as the node's default route")] = 0
    masquerade: Annotated[bool, doc("pods reach other networks with the node's address")] = True
    host_ports: Annotated[bool, doc("publish ports of pods on the node")] = True
    spoof_protection: Annotated[
        bool, doc("pods send from their own addresses only; off: a pod can route for others")
    ] = True


class Images(Table, frozen=True, kw_only=True):
    pinned: Annotated[tuple[str, ...], doc("references, * for any text, never to be removed")] = ()
    max_concurrent_downloads: Annotated[
        int, Meta(ge=1, le=64), doc("layers of one pull at a time")
    ] = 4
    max_image_bytes: Annotated[
        int, Meta(ge=1 << 20), doc("unpacked; a larger image is refused")
    ] = 64 << 30
    max_image_entries: Annotated[
        int, Meta(ge=1_000), doc("files of an image; one with more is refused")
    ] = 2_000_000
    private_redirects: Annotated[
        bool, doc("registries at public addresses may lead to private ones; never to loopback")
    ] = True


class Rlimits(Table, frozen=True, kw_only=True):
    """Each is "soft:hard", or one number for both; "unlimited" is one; empty: as the agent's own."""

    nofile: Annotated[str, doc("open files of a process")] = "1024:524288"
    nproc: Annotated[str, doc("processes of a user")] = ""
    core: Annotated[str, doc("bytes of a core dump")] = ""
    memlock: Annotated[str, doc("locked bytes of memory")] = ""

    def pairs(self) -> Iterator[tuple[str, int, int]]:
        """Name as in getrlimit(2), soft and hard limit; -1 is unlimited. Those that are set."""
        for name in self.__struct_fields__:
            if text := getattr(self, name):
                soft, hard = _rlimit(text)
                yield name.upper(), soft, hard


class Log(Table, frozen=True, kw_only=True):
    level: Annotated[
        Literal["debug", "info", "warning", "error"], doc("of the agent's own log")
    ] = "info"


class ContainerLogs(Table, frozen=True, kw_only=True):
    """A container above its limit is not read from, so that it waits; nothing of its output is lost."""

    max_bytes_per_second: Annotated[
        int,
        Meta(ge=0),
        doc("of each log, stamps included; a container that writes more waits; 0: no limit"),
    ] = 0
    burst_bytes: Annotated[
        int,
        Meta(ge=1),
        doc("of each log; what may come at once after a while of silence, and what one read gives"),
    ] = 16 << 20


class Seccomp(Table, frozen=True, kw_only=True):
    default_profile: Annotated[
        str, doc("OCI JSON file for RuntimeDefault; empty: the built-in one")
    ] = ""


class Cdi(Table, frozen=True, kw_only=True):
    directories: Annotated[
        tuple[str, ...], doc("of CDI specifications; a later one has priority over an earlier one")
    ] = ("/etc/cdi", "/var/run/cdi")
    hook_programs: Annotated[
        tuple[str, ...],
        doc("paths of the programs that hooks of CDI specifications may run; others are refused"),
    ] = HOOK_PROGRAMS
    hook_timeout_seconds: Annotated[
        int, Meta(ge=1, le=3_600), doc("of a hook; one that takes longer is killed, and has failed")
    ] = 60


class Config(Table, frozen=True, kw_only=True):
    root: Annotated[str, doc("images, containers and the database")] = "/var/lib/nodeagent"
    state: Annotated[str, doc("sockets and what ends with a reboot")] = DEFAULT_STATE
    listen: Annotated[str, doc("the CRI endpoint")] = f"unix://{DEFAULT_STATE}/nodeagent.sock"
    metrics: Annotated[str, doc("ADDRESS:PORT of the Prometheus endpoint; empty: none")] = ""
    certs_dir: Annotated[str, doc("registry hosts, <host>/hosts.toml")] = "/etc/nodeagent/certs.d"
    handlers: Annotated[tuple[str, ...], doc('names of RuntimeClass handlers, besides ""')] = ()
    absent_mount_sources_to_reject: Annotated[
        tuple[str, ...],
        doc(
            "host paths that are not made as directories where they are absent: a mount is refused"
        ),
    ] = ()
    slots: Annotated[
        int, Meta(ge=0, le=256), doc("pods prepared ahead, so that they start fast")
    ] = 4
    streaming: Streaming = Streaming()
    cgroup: Cgroup = Cgroup()
    network: Network = Network()
    images: Images = Images()
    rlimits: Rlimits = Rlimits()
    log: Log = Log()
    container_logs: ContainerLogs = ContainerLogs()
    seccomp: Seccomp = Seccomp()
    cdi: Cdi = Cdi()


# --- loading --------------------------------------------------------------------------------------------------------


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


def split_address(value: str) -> tuple[str, int]:
    """Host, without brackets, and port of ``ADDRESS:PORT``. Raises `ValueError`."""
    host, separator, port = value.rpartition(":")
    if not separator or not port.isdecimal() or int(port) > 65_535:
        raise ValueError(f"{value!r} is not ADDRESS:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


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


def _rlimit(value: str) -> tuple[int, int]:
    soft, _, hard = value.partition(":")
    limits = tuple(-1 if t == "unlimited" else int(t) for t in (soft, hard or soft))
    return limits[0], limits[1]


def _optional_rlimit(value: str) -> str:
    try:
        soft, hard = _rlimit(value) if value else (0, 0)
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
    return "\n".join(_lines(config, comment=False)) + "\n"


def commented_defaults() -> str:
    """A file with every key, its meaning and its default, all of it commented out."""
    return "\n".join(_lines(Config(), comment=True)) + "\n"


def _lines(table: Table, *, comment: bool, name: str = "") -> Iterator[str]:
    if name:
        yield f"\n[{name}]"
    fields = msgspec.inspect.type_info(type(table))
    assert isinstance(fields, msgspec.inspect.StructType)
    for field in fields.fields:
        value = getattr(table, field.name)
        if isinstance(value, Table):
            yield from _lines(value, comment=comment, name=field.name)
            continue
        setting = f"{field.name} = {_toml(value)}"
        yield f"# {_meaning(field.type)}\n# {setting}" if comment else setting


def _meaning(kind: msgspec.inspect.Type) -> str:
    schema = kind.extra_json_schema if isinstance(kind, msgspec.inspect.Metadata) else None
    return str((schema or {})["description"])


def _toml(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    # A JSON string is a TOML basic string: the same escapes, and DEL is the only character TOML alone forbids.
    return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")
