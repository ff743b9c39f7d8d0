"""The agent's configuration: one schema, TOML files, and what the command line overrides.

Sources, the later one wins key by key: the defaults below, the file, `config.d/*.toml` beside it in the order of their
names, the command line. A key that is unknown or ill-typed is refused with file, line and key. The schema is the
documentation: `nodeagent.config_reference` tells operators what is in it.
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
    """A table of the file. The docstring of each says to operators what the table is about."""


class Streaming(Table, frozen=True, kw_only=True):
    """The HTTP server for exec, attach and port-forward."""

    address: Annotated[
        str,
        doc(
            "ADDRESS:PORT of the server; port 0 is any free port; an address beyond loopback needs "
            "tls_cert and tls_key"
        ),
    ] = "127.0.0.1:0"
    tls_cert: Annotated[
        str,
        doc(
            "certificate of the server, a PEM file that is read again when it changes; empty: HTTP"
        ),
    ] = ""
    tls_key: Annotated[str, doc("private key of tls_cert, a PEM file")] = ""
    client_ca: Annotated[
        str,
        doc("certificate authority that clients need a certificate of, a PEM file; empty: none"),
    ] = ""
    idle_timeout_seconds: Annotated[
        Seconds, doc("a session without data in either direction is closed after this time")
    ] = 14_400
    creation_timeout_seconds: Annotated[
        Seconds, doc("time for a client to open all streams of its session")
    ] = 30


class Cgroup(Table, frozen=True, kw_only=True):
    """Where the cgroups of pods are, and how they are named."""

    driver: Annotated[
        Literal["auto", "cgroupfs", "systemd"],
        doc(
            "naming of cgroups: systemd (slices and scopes), cgroupfs (plain directories), or auto: "
            "systemd on a cgroup v2 node whose init is systemd, else cgroupfs; the kubelet adopts it"
        ),
    ] = "auto"
    parent: Annotated[
        str,
        doc(
            "absolute cgroup path of pods whose request names no parent; empty: /nodeagent-INSTANCE, "
            "where INSTANCE is 8 hex digits derived from root"
        ),
    ] = ""


class Network(Table, frozen=True, kw_only=True):
    """The network of pods: a bridge, addresses, and rules of nf_tables."""

    bridge: Annotated[
        str,
        Meta(max_length=15),
        doc("name of the bridge; empty: na followed by INSTANCE, 8 hex digits derived from root"),
    ] = ""
    subnet4: Annotated[
        str,
        doc(
            "IPv4 subnet of pods until the kubelet sends a pod CIDR; empty: pods have no IPv4 address, "
            "whatever the kubelet sends; the default gives way to another private /20 where it "
            "overlaps a route of the node"
        ),
    ] = "10.88.0.0/16"
    subnet6: Annotated[
        str,
        doc(
            "IPv6 subnet of pods until the kubelet sends a pod CIDR; empty: pods have no IPv6 address, "
            "whatever the kubelet sends"
        ),
    ] = ""
    mtu: Annotated[
        int, Meta(ge=0, le=65_535), doc("MTU of pods; 0: that of the node's default route")
    ] = 0
    masquerade: Annotated[
        bool, doc("packets of pods leave the node with the node's address as their source")
    ] = True
    host_ports: Annotated[bool, doc("publish the host ports of pods on the node")] = True
    spoof_protection: Annotated[
        bool,
        doc(
            "drop what a pod sends from a MAC or IP address that is not its own; false: pods can route "
            "for others (VPN gateways, keepalived)"
        ),
    ] = True


class Images(Table, frozen=True, kw_only=True):
    """Images, and limits on what is pulled."""

    pinned: Annotated[
        tuple[str, ...],
        doc("images that the kubelet's garbage collection keeps: references, with * for any text"),
    ] = ()
    max_concurrent_downloads: Annotated[
        int, Meta(ge=1, le=64), doc("layers that one pull downloads at a time")
    ] = 4
    max_image_bytes: Annotated[
        int, Meta(ge=1 << 20), doc("largest size of an unpacked image; a larger one is refused")
    ] = 64 << 30
    max_image_entries: Annotated[
        int,
        Meta(ge=1_000),
        doc("largest number of files and directories in an image; one with more is refused"),
    ] = 2_000_000
    private_redirects: Annotated[
        bool,
        doc(
            "registries at public addresses may redirect to private addresses (10.0.0.0/8 and the "
            "like); never to loopback, link-local or metadata addresses"
        ),
    ] = True


class Rlimits(Table, frozen=True, kw_only=True):
    """Resource limits of containers (getrlimit(2)), each "SOFT:HARD" or one number for both.

    "unlimited" stands for a number; empty: the agent's own limit.
    """

    nofile: Annotated[str, doc("open files of a process")] = "1024:524288"
    nproc: Annotated[str, doc("processes of a user")] = ""
    core: Annotated[str, doc("size of a core dump, in bytes")] = ""
    memlock: Annotated[str, doc("locked memory of a process, in bytes")] = ""

    def pairs(self) -> Iterator[tuple[str, int, int]]:
        """Yield name as in getrlimit(2), soft and hard limit of each that is set; -1 is unlimited."""
        for name in self.__struct_fields__:
            if text := getattr(self, name):
                soft, hard = _rlimit(text)
                yield name.upper(), soft, hard


class Log(Table, frozen=True, kw_only=True):
    """The agent's own log, on standard error."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"], doc("lowest level of messages in the log")
    ] = "info"


class ContainerLogs(Table, frozen=True, kw_only=True):
    """How fast a container can write to its log.

    A container above the limit is not read from, so that its writes wait; no output is lost.
    """

    max_bytes_per_second: Annotated[
        int, Meta(ge=0), doc("bytes per second of each log, time stamps included; 0: no limit")
    ] = 0
    burst_bytes: Annotated[
        int, Meta(ge=1), doc("bytes that a log takes at once after a pause, above the limit")
    ] = 16 << 20


class Seccomp(Table, frozen=True, kw_only=True):
    """System call filters."""

    default_profile: Annotated[
        str,
        doc(
            "profile of containers with RuntimeDefault: a JSON file in the format of the OCI runtime "
            "specification; empty: the built-in profile"
        ),
    ] = ""


class Cdi(Table, frozen=True, kw_only=True):
    """Devices by the Container Device Interface."""

    directories: Annotated[
        tuple[str, ...],
        doc("directories with CDI specifications; of one device in two of them, the later counts"),
    ] = ("/etc/cdi", "/var/run/cdi")
    hook_programs: Annotated[
        tuple[str, ...],
        doc("programs that hooks of CDI specifications may run; devices with others are refused"),
    ] = HOOK_PROGRAMS
    hook_timeout_seconds: Annotated[
        int,
        Meta(ge=1, le=3_600),
        doc("a hook that runs longer is killed, and the container is not created"),
    ] = 60


class Config(Table, frozen=True, kw_only=True):
    """Places, sockets, and what belongs to no table."""

    root: Annotated[
        str, doc("directory of persistent data: images, containers, database; for root alone")
    ] = "/var/lib/nodeagent"
    state: Annotated[
        str,
        doc(
            "directory of runtime state, gone after a reboot: sockets, exit records, files of pods"
        ),
    ] = DEFAULT_STATE
    listen: Annotated[
        str,
        doc("socket of the CRI, unix:///PATH; the kubelet's containerRuntimeEndpoint names it"),
    ] = f"unix://{DEFAULT_STATE}/nodeagent.sock"
    metrics: Annotated[
        str, doc("ADDRESS:PORT of the Prometheus endpoint, path /metrics; empty: no endpoint")
    ] = ""
    certs_dir: Annotated[
        str, doc("directory of registry settings, <host>/hosts.toml in containerd's format")
    ] = "/etc/nodeagent/certs.d"
    handlers: Annotated[
        tuple[str, ...],
        doc(
            'names of RuntimeClass handlers that are accepted besides ""; all run pods in the same way'
        ),
    ] = ()
    absent_mount_sources_to_reject: Annotated[
        tuple[str, ...],
        doc(
            "host paths that must exist: a mount of one that does not is refused; other absent host "
            "paths are created as directories"
        ),
    ] = ()
    slots: Annotated[
        int,
        Meta(ge=0, le=256),
        doc("pods prepared in advance, for fast starts; each takes about 1.5 MiB of memory"),
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
