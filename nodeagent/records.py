"""The records of the agent, which are frozen, and the pure transitions between them.

Facts are stored, state is derived. A record is replaced, never changed: a transition returns a new one, the store
writes it, and only then is it published.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from nodeagent.errors import FailedPrecondition
from nodeagent.linux import userns
from nodeagent.words import HookStage, NamespaceMode, Propagation


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """An object that the store keeps under `key`."""

    @property
    def key(self) -> str:
        raise NotImplementedError


# --- what pods and containers are asked to be ----------------------------------------------------------------------
#
# The CRI's messages in the agent's own form: validated, enums as words, absent messages as None or empty.

Labels = dict[str, str]
CgroupMount = Literal["default", "readonly", "writable"]
GroupsPolicy = Literal["merge", "strict"]
OwnOrNodes = Literal["pod", "node"]
ProfileKind = Literal["default", "unconfined", "localhost", "oci"]
Transport = Literal["tcp", "udp", "sctp"]


class Config(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The base of what a caller configures."""


class IdMapping(Config, frozen=True, kw_only=True):
    inside: int
    outside: int
    length: int


class UserNamespace(Config, frozen=True, kw_only=True):
    """A user namespace: mode "pod" has exactly one mapping of uids and one of gids, "node" none."""

    mode: OwnOrNodes
    uids: tuple[IdMapping, ...] = ()
    gids: tuple[IdMapping, ...] = ()


class Namespaces(Config, frozen=True, kw_only=True):
    """The namespaces of a pod or container. target: whose PID namespace is joined. cgroup: of containers only."""

    network: OwnOrNodes = "pod"
    pid: NamespaceMode = "container"
    ipc: OwnOrNodes = "pod"
    target: str = ""
    user: UserNamespace | None = None
    cgroup: Literal["container", "node"] = "container"

    @property
    def user_mapping(self) -> UserNamespace | None:
        """The pod's own user namespace; None for the node's, whether asked for or not."""
        return self.user if self.user is not None and self.user.mode == "pod" else None

    @property
    def owned(self) -> frozenset[str]:
        """The kinds of namespaces that the pod does not share with the node; its UTS follows its network."""
        owned = {"net", "uts"} if self.network == "pod" else set()
        if self.ipc == "pod":
            owned.add("ipc")
        if self.user_mapping is not None:
            owned.add("user")
        return frozenset(owned)

    def on_node(self, uid: int, gid: int) -> tuple[int, int]:
        """The ids that a user and a group of the pod have on the node; ValueError where they are not mapped."""
        mapping = self.user_mapping
        if mapping is None:
            return uid, gid
        return userns.outside(uid, mapping.uids), userns.outside(gid, mapping.gids)


class Profile(Config, frozen=True, kw_only=True):
    """A seccomp or AppArmor profile.

    ref: absolute path of a seccomp JSON, or a loaded AppArmor profile; for "oci", the reference of an artifact, with
    digest. base: what an artifact is intersected with, the path of a seccomp JSON; "" is the default profile.
    """

    kind: ProfileKind
    ref: str = ""
    base: str = ""


class SELinux(Config, frozen=True, kw_only=True):
    user: str = ""
    role: str = ""
    type: str = ""
    level: str = ""


class Resources(Config, frozen=True, kw_only=True):
    """Limits with the CRI's meaning: 0 is not set, -1 no limit. swap is memory and swap together, as in cgroup v1."""

    cpu_period_usec: int = 0
    cpu_quota_usec: int = 0
    cpu_shares: int = 0
    memory_limit_bytes: int = 0
    memory_swap_limit_bytes: int = 0
    cpuset_cpus: str = ""
    cpuset_mems: str = ""
    oom_score_adj: int = 0
    pids_limit: int = 0
    hugepage_limits: dict[str, int] = {}
    unified: dict[str, str] = {}


def updated(old: Resources, new: Resources) -> Resources:
    """Return `old` with all that is set in `new`. A memory limit alone leaves as much swap as before."""
    changes: dict[str, Any] = {
        name: value for name in Resources.__struct_fields__ if (value := getattr(new, name))
    }
    for name in ("unified", "hugepage_limits"):
        if name in changes:
            changes[name] = {**getattr(old, name), **changes[name]}
    if new.memory_limit_bytes and not new.memory_swap_limit_bytes:
        changes["memory_swap_limit_bytes"] = _same_swap(old, new.memory_limit_bytes)
    return msgspec.structs.replace(old, **changes)


def _same_swap(old: Resources, memory_limit_bytes: int) -> int:
    both = old.memory_swap_limit_bytes
    if both <= 0:
        return both
    return -1 if memory_limit_bytes < 0 else both - old.memory_limit_bytes + memory_limit_bytes


class PortMapping(Config, frozen=True, kw_only=True):
    protocol: Transport
    container_port: int
    host_port: int
    host_ip: str = ""


class DNS(Config, frozen=True, kw_only=True):
    servers: tuple[str, ...] = ()
    searches: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


class SandboxConfig(Config, frozen=True, kw_only=True):
    """A PodSandboxConfig. dns is None where the caller gave none: the node's resolv.conf is used."""

    name: str
    uid: str
    namespace: str
    attempt: int = 0
    hostname: str = ""
    log_directory: str = ""
    dns: DNS | None = None
    port_mappings: tuple[PortMapping, ...] = ()
    labels: Labels = {}
    annotations: Labels = {}
    cgroup_parent: str = ""
    namespaces: Namespaces = Namespaces()
    sysctls: dict[str, str] = {}
    privileged: bool = False
    readonly_rootfs: bool = False
    run_as_user: int | None = None
    run_as_group: int | None = None
    supplemental_groups: tuple[int, ...] = ()
    groups_policy: GroupsPolicy = "merge"
    seccomp: Profile | None = None
    apparmor: Profile | None = None
    selinux: SELinux | None = None
    overhead: Resources | None = None
    resources: Resources | None = None


class MountConfig(Config, frozen=True, kw_only=True):
    """A mount. image: of an image volume, what PullImage returned, with an empty host_path.

    options: noexec, nodev, nosuid. must_exist: an absent host path is an error, and not made: of a CDI specification.
    asked_path: the path in the request, where container_path is a shorter form of it.
    """

    container_path: str
    asked_path: str = ""
    host_path: str = ""
    readonly: bool = False
    recursive_read_only: bool = False
    selinux_relabel: bool = False
    propagation: Propagation = "private"
    uids: tuple[IdMapping, ...] = ()
    gids: tuple[IdMapping, ...] = ()
    image: str = ""
    image_user_specified: str = ""
    image_annotations: Labels = {}
    image_runtime_handler: str = ""
    image_sub_path: str = ""
    options: tuple[str, ...] = ()
    must_exist: bool = False


class DeviceConfig(Config, frozen=True, kw_only=True):
    """A device. permissions: any of r, w, m. mode, uid and gid: of the file in the container; None is as on the node.

    type, major, minor: of a CDI specification that has them; the file of the node is not examined then.
    """

    container_path: str
    host_path: str
    permissions: str
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    type: Literal["", "b", "c"] = ""
    major: int = 0
    minor: int = 0


class HookConfig(Config, frozen=True, kw_only=True):
    """A program of the node that is run at a stage of the container's life, as the OCI runtime specification has it.

    timeout_s 0: the hook has none of its own. source: the CDI specification that asks for it.
    """

    stage: HookStage
    path: str
    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    timeout_s: int = 0
    source: str


class CapabilityChange(Config, frozen=True, kw_only=True):
    """A change of capabilities, as names without CAP_, or ALL."""

    add: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    add_ambient: tuple[str, ...] = ()


class ContainerConfig(Config, frozen=True, kw_only=True):
    """A ContainerConfig with its security context. envs: names, and values as bytes of any kind.

    image: what the caller asked for, in this order of trust: image (usually the id), then what the user specified.
    masked_paths, readonly_paths: None is the agent's own choice, empty is none.
    hooks: of CDI specifications, never of a request or an image.
    cgroup_mount: the default is writable for a privileged container, else read-only.
    """

    name: str
    attempt: int = 0
    image: str
    image_user_specified: str = ""
    image_annotations: Labels = {}
    image_runtime_handler: str = ""
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    working_dir: str = ""
    envs: tuple[tuple[str, bytes], ...] = ()
    mounts: tuple[MountConfig, ...] = ()
    devices: tuple[DeviceConfig, ...] = ()
    cdi_devices: tuple[str, ...] = ()
    hooks: tuple[HookConfig, ...] = ()
    labels: Labels = {}
    annotations: Labels = {}
    log_path: str = ""
    stdin: bool = False
    stdin_once: bool = False
    tty: bool = False
    stop_signal: int = 0
    resources: Resources = Resources()
    namespaces: Namespaces = Namespaces()
    privileged: bool = False
    readonly_rootfs: bool = False
    cgroup_mount: CgroupMount = "default"
    no_new_privs: bool = False
    capabilities: CapabilityChange = CapabilityChange()
    run_as_user: int | None = None
    run_as_username: str = ""
    run_as_group: int | None = None
    supplemental_groups: tuple[int, ...] = ()
    groups_policy: GroupsPolicy = "merge"
    masked_paths: tuple[str, ...] | None = None
    readonly_paths: tuple[str, ...] | None = None
    seccomp: Profile | None = None
    apparmor: Profile | None = None
    selinux: SELinux | None = None


# --- pods and containers --------------------------------------------------------------------------------------------


class Sandbox(Record, frozen=True, kw_only=True):
    """A pod sandbox.

    ::

        (intention) ── ready_at ──► READY ── stopped_at ──► NOTREADY ── removed from the store

    A record without ready_at is a RunPodSandbox under way, or one that a crash interrupted: no call shows it, and the
    next start undoes it. addresses: empty on the node's network. Times are ns since the epoch.
    """

    id: str
    config: SandboxConfig
    runtime_handler: str = ""
    cgroup_parent: str
    boot_id: str
    created_at: int
    ready_at: int = 0
    stopped_at: int = 0
    addresses: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return self.id

    @property
    def ready(self) -> bool:
        return self.ready_at > 0 and self.stopped_at == 0


class MountStatus(Config, frozen=True, kw_only=True):
    """A mount as ContainerStatus reports it: as requested, with the digest of an image volume."""

    config: MountConfig
    image_ref: str = ""


class Container(Record, frozen=True, kw_only=True):
    """A container.

    ::

        (intention) ── created_at ──► CREATED ── started_at ──► RUNNING ── finished_at ──► EXITED
                                         └───────── finished_at (StartError) ──────────────┘

    image_ref: the repo digest, else the id. stop_signal: the effective one. identity: what the first process got.
    """

    id: str
    sandbox_id: str
    config: ContainerConfig
    image_id: str
    image_ref: str
    image_name: str
    mounts: tuple[MountStatus, ...] = ()
    cgroup_path: str
    log_path: str = ""
    resources: Resources
    stop_signal: int
    pid: int = 0
    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    created_at: int = 0
    started_at: int = 0
    finished_at: int = 0
    exit_code: int = 0
    reason: str = ""
    message: str = ""

    @property
    def key(self) -> str:
        return self.id

    @property
    def state(self) -> ContainerState:
        if self.finished_at:
            return "exited"
        return "running" if self.started_at else "created"


ContainerState = Literal["created", "running", "exited"]


def started(container: Container, at: int) -> Container:
    """The transition CREATED → RUNNING; raises FailedPrecondition in any other state."""
    if container.state != "created":
        raise FailedPrecondition(f'container "{container.id}": is {container.state}, not created')
    return msgspec.structs.replace(container, started_at=at)


def exited(container: Container, code: int, at: int, *, oom: bool) -> Container:
    """The transition RUNNING → EXITED; a second end changes nothing."""
    if container.state == "exited":
        return container
    if container.state == "created":
        raise FailedPrecondition(f'container "{container.id}": was never started')
    reason = "OOMKilled" if oom else "Completed" if code == 0 else "Error"
    return msgspec.structs.replace(
        container, finished_at=max(at, container.started_at), exit_code=code, reason=reason
    )


def start_failed(container: Container, message: str, at: int) -> Container:
    """The transition CREATED → EXITED with reason StartError: the program could not be executed."""
    if container.state != "created":
        raise FailedPrecondition(f'container "{container.id}": is {container.state}, not created')
    return msgspec.structs.replace(
        container, finished_at=at, exit_code=128, reason="StartError", message=message
    )


def lost(container: Container, at: int) -> Container:
    """The transition to EXITED with an unknown code, as no process saw the end (a reboot)."""
    if container.state == "exited":
        return container
    return msgspec.structs.replace(
        container,
        finished_at=at,
        exit_code=255,
        reason="Unknown",
        message="its end was not observed",
    )


# --- images -----------------------------------------------------------------------------------------------------


class ImageConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The execution parameters of an image (image-spec ``config.md``); absent values are empty."""

    user: str = ""
    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    working_dir: str = ""
    stop_signal: str = ""
    labels: dict[str, str] = {}
    volumes: tuple[str, ...] = ()


class Image(Record, frozen=True, kw_only=True):
    """An image that is complete on this node, which is verified, unpacked and synced.

    id: digest of its config, ``sha256:…``; layers: chain IDs, lowest first; size_bytes: of its blobs as transferred.
    """

    id: str
    repo_tags: tuple[str, ...] = ()
    repo_digests: tuple[str, ...] = ()
    manifest: str
    layers: tuple[str, ...]
    size_bytes: int
    config: ImageConfig
    pulled_at: int
    pinned: bool = False

    @property
    def key(self) -> str:
        return self.id


class Layer(Record, frozen=True, kw_only=True):
    """An unpacked layer: ``layers/<chain ID>/``, read-only and shared by every image that has it.

    blob: digest of what was transferred, of size_bytes; used_bytes and inodes: of what it was unpacked to.
    opaque: it hides every layer below it.
    """

    chain_id: str
    diff_id: str
    blob: str
    size_bytes: int
    used_bytes: int
    inodes: int
    opaque: bool = False

    @property
    def key(self) -> str:
        return self.chain_id


class ImageHold(Record, frozen=True, kw_only=True):
    """A hold of a container on its layers, which stay even if the image that they came with is removed."""

    holder: str
    image_id: str
    layers: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"{self.holder}/{self.image_id}"


# --- security profiles ------------------------------------------------------------------------------------------


class StoredProfile(Record, frozen=True, kw_only=True):
    """A seccomp profile from an OCI artifact, whose documents are in ``profiles/sha256/``.

    digest: of the manifest, which names it; content: of the JSON; refs: all names that it was pulled by.
    size_bytes: of both.
    """

    digest: str
    content: str
    refs: tuple[str, ...]
    size_bytes: int
    pulled_at: int

    @property
    def key(self) -> str:
        return self.digest


# --- network ----------------------------------------------------------------------------------------------------


class NodeNetwork(Record, frozen=True, kw_only=True):
    """Choices that outlive the agent. chosen: the subnet in place of a configured one that others had.

    pod_cidrs: those of the last UpdateRuntimeConfig, at most one of each family.
    """

    chosen: dict[str, str] = {}
    pod_cidrs: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return "node"


class Lease(Record, frozen=True, kw_only=True):
    """The addresses and the link of one pod. Written before either exists, deleted after both are gone.

    addresses: with the length of their prefix. released_at: the pod is gone, but its link may still be there.
    """

    pod_id: str
    addresses: tuple[str, ...]
    link: str
    acquired_at: int
    released_at: int = 0

    @property
    def key(self) -> str:
        return self.pod_id


class HostPort(Record, frozen=True, kw_only=True):
    """A port of the node that is forwarded to a pod. host_ip is empty for every address of the node."""

    protocol: str
    host_ip: str
    host_port: int
    pod_id: str
    container_port: int

    @property
    def key(self) -> str:
        return f"{self.protocol}/{self.host_ip}/{self.host_port}"


KINDS: tuple[type[Record], ...] = (
    Image,
    Layer,
    ImageHold,
    StoredProfile,
    NodeNetwork,
    Lease,
    HostPort,
    Sandbox,
    Container,
)
