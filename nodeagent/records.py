"""The records of the agent, which are frozen, and the pure transitions between them.

Facts are stored, state is derived. A record is replaced, never changed: a transition returns a new one, the store
writes it, and only then is it published.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from nodeagent.errors import FailedPrecondition
from nodeagent.requests import Config, ContainerConfig, MountConfig, Resources, SandboxConfig


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """An object that the store keeps under `key`."""

    @property
    def key(self) -> str:
        raise NotImplementedError


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
    opaque: it hides every layer below it. tree: digest of what it was unpacked to, "" of earlier versions.
    """

    chain_id: str
    diff_id: str
    blob: str
    size_bytes: int
    used_bytes: int
    inodes: int
    opaque: bool = False
    tree: str = ""

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
