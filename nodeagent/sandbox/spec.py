"""The plan of a pod and of its containers, as the agent hands it to a supervisor.

Everything is decided by the agent before the supervisor sees it: a plan is JSON of plain values, without a reference
to the CRI or to the store, so that it can be printed when a step of it fails. A text that may hold bytes of any kind
(arguments, environment, paths) is UTF-8 with surrogate escapes. Standard library only: supervisors import this.
"""

from typing import Literal, NotRequired, TypedDict

from nodeagent.words import HookStage, NamespaceMode, Propagation

# /dev/shm where no size is asked for, as in Docker and the other CRI runtimes.
DEFAULT_SHM_BYTES = 64 << 20

# PATH where neither the image nor the request has one: as a variable, and to look for the program of an exec.
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class IdMap(TypedDict):
    """One line of a ``uid_map``."""

    inside: int
    outside: int
    length: int


class PodPlan(TypedDict):
    """The plan with which a supervisor is forked: enough for a warm slot that has no pod yet.

    directory: `pods/<id>` of the state directory, which exists; namespaces that are not listed are the node's.
    """

    id: str
    directory: str
    namespaces: list[Literal["net", "ipc", "uts", "user"]]
    uid_map: NotRequired[list[IdMap]]
    gid_map: NotRequired[list[IdMap]]


class PodSettings(TypedDict):
    """The settings that make a slot a pod. hostname is None where the UTS namespace is the node's.

    sysctls: dotted names, all of them of namespaces that the pod owns. shm_bytes is None with the node's IPC.
    pid: "pod" starts the init process that owns the shared PID namespace.
    """

    hostname: str | None
    sysctls: dict[str, str]
    shm_bytes: int | None
    pid: Literal["container", "pod", "node"]


class Mount(TypedDict):
    """One step of the mount plan, executed in order; `target` is a path inside the root file system.

    kind "bind": `source` is a host path, opened before the root is entered, links followed on the host.
    kind "fs": a new file system of type `source` (proc, sysfs, tmpfs, devpts, mqueue, cgroup2, cgroup) with `data`.
    attributes: "ro", "nosuid", "nodev", "noexec", "strictatime", "relatime", "noatime", "nosymfollow".
    recursive: the attributes hold for all mounts below, too (recursive read-only); binds always take the whole tree.
    lower: for kind "image", the layer directories, uppermost first, and sub_path below them.
    uid_map, gid_map: of an idmapped bind, how the owners of its files are seen.
    label: of SELinux. A new file system is mounted with it (the root of mqueue is given it), a bound tree is given it.
    absent: for kind "bind", what is done where `source` is absent: a directory is made, or the request is rejected
    because of the configuration. Without it, the absence is an error.
    """

    kind: Literal["bind", "fs", "image"]
    target: str
    source: str
    attributes: list[str]
    propagation: Propagation
    recursive: bool
    data: dict[str, str]
    lower: NotRequired[list[str]]
    sub_path: NotRequired[str]
    absent: NotRequired[Literal["make", "reject"]]
    uid_map: NotRequired[list[IdMap]]
    gid_map: NotRequired[list[IdMap]]
    label: NotRequired[str]


class Volume(TypedDict):
    """A volume of the image, mounted before all else.

    source: a directory to be made on the node. It gets what the image has at `target`, and the label.
    """

    source: str
    target: str
    label: NotRequired[str]


class Rootfs(TypedDict):
    """An overlay: shared layer directories, uppermost first, below the container's own upper directory.

    label: of SELinux, which it is mounted with, and so is what paths are masked with.
    """

    lower: list[str]
    upper: str
    work: str
    readonly: bool
    label: NotRequired[str]


class Device(TypedDict):
    """A node to make in the container's /dev.

    of_node: uid and gid are the node's, also where the pod has a user namespace: its root has no more rights to it.
    """

    path: str
    type: Literal["c", "b"]
    major: int
    minor: int
    mode: int
    uid: int
    gid: int
    of_node: NotRequired[bool]


class UserRequest(TypedDict):
    """The requested user; resolved against /etc/passwd and /etc/group of the root file system.

    uid and username: at most one is set; neither means root. gid None means the user's primary group.
    merge_groups: add the groups that the image's /etc/group gives the user.
    """

    uid: int | None
    username: str
    gid: int | None
    groupname: str
    groups: list[int]
    merge_groups: bool


class Identity(TypedDict):
    """The resolved user and groups of a process."""

    uid: int
    gid: int
    groups: list[int]
    home: str


class Capabilities(TypedDict):
    """Bit masks, bit n = capability number n."""

    bounding: int
    permitted: int
    effective: int
    inheritable: int
    ambient: int


class Rlimit(TypedDict):
    """A resource limit. resource: a name of getrlimit(2) without RLIMIT_; -1 is infinity."""

    resource: str
    soft: int
    hard: int


class ProcessPlan(TypedDict):
    """The attributes of the container's first process, and of every exec, besides the arguments.

    seccomp: a compiled filter (array of struct sock_filter), base64; "" is unconfined. seccomp_flags: of seccomp(2).
    forbidden_calls: those of `seccomp.successor.CALLS` that the filter does not allow.
    uid_map, gid_map: of the pod's user namespace, where it has one.
    """

    env: list[str]
    cwd: str
    user: UserRequest
    capabilities: Capabilities
    no_new_privs: bool
    seccomp: str
    seccomp_flags: int
    apparmor: str
    selinux: str
    rlimits: list[Rlimit]
    oom_score_adj: int | None
    umask: int
    forbidden_calls: NotRequired[list[str]]
    uid_map: NotRequired[list[IdMap]]
    gid_map: NotRequired[list[IdMap]]


class Hook(TypedDict):
    """A program of the node, or of the container at startContainer. env: ``NAME=value``, all that it gets.

    timeout_ms: it is killed then. source: the file that asks for it.
    """

    path: str
    args: list[str]
    env: list[str]
    timeout_ms: int
    source: str


class Hooks(TypedDict):
    """The hooks of a container, by stage.

    bundle: ``bundle`` in the container's directory in that of its pod; the root file system is shown beside it.
    config: the content of its config.json. annotations: for the state of the container that hooks read.
    """

    bundle: str
    config: str
    annotations: dict[str, str]
    stages: dict[HookStage, list[Hook]]


class LogLimit(TypedDict):
    """The limit of what a container may write to its log before it has to wait: a token bucket, in bytes of the log."""

    bytes_per_second: int
    burst_bytes: int


class ContainerPlan(TypedDict):
    """A container, from its root file system to its first program.

    pid "target" joins the PID namespace of the container `pid_target` of the same pod.
    log_path: absolute host path, or "" for no log; no link is followed below log_root, a directory above it.
    log_limit: without it, a container writes as fast as it is read.
    masked and readonly paths: of the container, absent ones skipped.
    volumes: parents first; a supervisor of an earlier version does not know them.
    cgroup_namespace: False only for containers that are to see the node's cgroups.
    """

    id: str
    argv: list[str]
    process: ProcessPlan
    rootfs: Rootfs
    mounts: list[Mount]
    volumes: NotRequired[list[Volume]]
    devices: list[Device]
    masked_paths: list[str]
    readonly_paths: list[str]
    pid: NamespaceMode
    pid_target: str
    cgroup_namespace: bool
    privileged: bool
    tty: bool
    stdin: bool
    stdin_once: bool
    log_path: str
    log_root: NotRequired[str]
    hooks: NotRequired[Hooks]
    log_limit: NotRequired[LogLimit]


class ExecPlan(TypedDict):
    """A further process in a running container; everything else is as in the container's ProcessPlan.

    timeout_ms: the whole tree is killed then; 0 is never. oom_score_adj: where it may have changed since.
    """

    container: str
    argv: list[str]
    tty: bool
    timeout_ms: int
    oom_score_adj: NotRequired[int]


class Exit(TypedDict):
    """The end of a container or an exec. code: 0-255, 128 + n for signal n; oom: the kernel's OOM killer ended it."""

    code: int
    at: int
    oom: bool
