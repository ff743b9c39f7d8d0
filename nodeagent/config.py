"""The agent's configuration: its keys, their types, bounds, defaults, and what operators are told of them.

`nodeagent.config_file` reads it from files, `nodeagent.config_reference` makes texts of it.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

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
                soft, hard = parse_rlimit(text)
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


# --- values that are texts ------------------------------------------------------------------------------------------


def split_address(value: str) -> tuple[str, int]:
    """Host, without brackets, and port of ``ADDRESS:PORT``. Raises `ValueError`."""
    host, separator, port = value.rpartition(":")
    if not separator or not port.isdecimal() or int(port) > 65_535:
        raise ValueError(f"{value!r} is not ADDRESS:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def parse_rlimit(value: str) -> tuple[int, int]:
    """Soft and hard limit of ``SOFT:HARD`` or of one number; -1 is unlimited. Raises `ValueError`."""
    soft, _, hard = value.partition(":")
    limits = tuple(-1 if t == "unlimited" else int(t) for t in (soft, hard or soft))
    return limits[0], limits[1]
