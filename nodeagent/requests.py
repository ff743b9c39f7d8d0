"""What pods and containers are asked to be: the CRI's messages in the agent's own form, frozen.

They are validated, enums are words, and absent messages are None or empty. A record has its request in it, so that each
new field has a default: what an earlier version has written lacks it.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from nodeagent.linux import userns
from nodeagent.words import HookStage, NamespaceMode, Propagation

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
