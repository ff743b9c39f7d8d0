"""Planning of a container: from its request and image to the plan that a supervisor executes.

The plan is complete: nothing in it is looked up again, so that it can be printed, kept and tested without root.
"""

import base64
import posixpath
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

from nodeagent.cgroups.manager import Cgroups
from nodeagent.config import Config
from nodeagent.errors import InvalidArgument, NotFound
from nodeagent.lifecycle.inventory import Inventory
from nodeagent.lifecycle.plan import (
    bundle,
    cgroup_mounts,
    devices,
    etc_files,
    file_labels,
    mounts,
    process,
)
from nodeagent.lifecycle.plan.devices import ContainerDevices
from nodeagent.lifecycle.plan.host_paths import HostPaths
from nodeagent.lifecycle.plan.profiles import UNCONFINED, Profiles, filtering, with_artifact
from nodeagent.records import Container, Image, MountStatus, Sandbox
from nodeagent.requests import ContainerConfig
from nodeagent.sandbox.seccomp import successor as seccomp_successor
from nodeagent.sandbox.seccomp.profile import Filter
from nodeagent.sandbox.spec import (
    Capabilities,
    ContainerPlan,
    LogLimit,
    Mount,
    ProcessPlan,
    Rlimit,
    Rootfs,
)

UMASK = 0o022


class HostInputs(NamedTuple):
    """What a container's config names on the node, as it was when the container was planned."""

    devices: ContainerDevices
    seccomp: Filter
    apparmor: str


class Catalog(Protocol):
    """The part of the image store that a planner needs."""

    def find(self, name_or_id: str) -> Image | None: ...

    def lower_dirs(self, image: Image) -> Sequence[Path]: ...


class Artifacts(Protocol):
    """The part of the security profiles from registries that a planner needs."""

    async def read(self, reference: str) -> bytes | None:
        """The text of a profile; None where it is unknown whether it is there."""


class Planner:
    """Makes plans of requests, with what the node has."""

    def __init__(
        self,
        inventory: Inventory,
        images: Catalog,
        cgroups: Cgroups,
        profiles: Profiles,
        artifacts: Artifacts,
        config: Config,
        *,
        pods: Path,
    ) -> None:
        self._inventory = inventory
        self._images = images
        self._profiles = profiles
        self._artifacts = artifacts
        self._host_paths = HostPaths()
        self._pods = pods
        self._rlimits = [
            Rlimit(resource=name, soft=soft, hard=hard)
            for name, soft, hard in config.rlimits.pairs()
        ]
        self._rejected = frozenset(map(posixpath.normpath, config.absent_mount_sources_to_reject))
        self._logs = config.container_logs
        self._hook_seconds = config.cdi.hook_timeout_seconds
        self._delegates = cgroups.delegates
        self._hierarchies = {
            mount.name: mount.options.split(",") if mount.type == "cgroup" else []
            for mount in cgroups.mounts()
        }

    async def resolve(self, config: ContainerConfig) -> HostInputs:
        """Look up what the config names on the node.

        A path of the requester's is looked up in a thread; all else is memory, and the node's own /dev and /sys.
        Raises FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted and Unsupported.
        """
        what = f'container "{config.name}"'
        asked = [
            await self._host_paths.look_up(what, wanted.host_path, partial(devices.named, wanted))
            for wanted in config.devices
        ]
        return HostInputs(
            devices=devices.container_devices(config, asked),
            seccomp=await self._seccomp(config, what),
            apparmor=await self._profiles.apparmor(config),
        )

    async def _seccomp(self, config: ContainerConfig, what: str) -> Filter:
        profile = filtering(config)
        if profile is None:
            return UNCONFINED
        bounding = self._capabilities(config)["bounding"]
        if profile.kind != "oci":
            return await self._local(profile.ref, bounding, what)
        artifact = await self._artifacts.read(profile.ref)
        base = await self._local(profile.base, bounding, what)
        if artifact is None:
            return base
        return await with_artifact(profile.ref, artifact, bounding, base)

    async def _local(self, path: str, bounding: int, what: str) -> Filter:
        local = partial(self._profiles.local, path, bounding)
        return await self._host_paths.look_up(what, path, local) if path else local()

    def plan(
        self,
        sandbox: Sandbox,
        container: Container,
        image: Image,
        inputs: HostInputs,
        directory: Path,
    ) -> ContainerPlan:
        """Make the plan. directory: the container's own, with `upper` and `work`.

        Raises InvalidArgument, NotFound and Unsupported.
        """
        config = container.config
        cgroup_mounts.check(config, delegates=self._delegates)
        labels = self._profiles.selinux(config)
        shared = etc_files.directory(self._pods / sandbox.id)
        masked, readonly = _restricted_paths(config)
        plan = ContainerPlan(
            id=container.id,
            argv=process.arguments(config, image.config),
            process=self._process(sandbox, config, image, inputs, labels.process),
            rootfs=Rootfs(
                lower=[str(layer) for layer in self._images.lower_dirs(image)],
                upper=str(directory / "upper"),
                work=str(directory / "work"),
                readonly=config.readonly_rootfs,
            ),
            mounts=self._mounts(sandbox, config, shared),
            devices=inputs.devices.nodes,
            masked_paths=masked,
            readonly_paths=readonly,
            pid=config.namespaces.pid,
            pid_target=self._pid_target(sandbox, config),
            cgroup_namespace=config.namespaces.cgroup == "container",
            privileged=config.privileged,
            tty=config.tty,
            stdin=config.stdin,
            stdin_once=config.stdin_once,
            log_path=container.log_path,
            log_root=sandbox.config.log_directory,
        )
        # The next three read the plan, each what those before have added: labels cover the volumes, and the bundle of
        # hooks describes all of it.
        if image.config.volumes:
            plan["volumes"] = mounts.image_volumes(image.config.volumes, directory, plan["mounts"])
        if labels.files:
            file_labels.assign(plan, config, shared, labels.files)
        if config.hooks:
            pod = self._pods / sandbox.id
            plan["hooks"] = bundle.hooks(config, plan, pod, self._hook_seconds)
        if self._logs.max_bytes_per_second:
            plan["log_limit"] = LogLimit(
                bytes_per_second=self._logs.max_bytes_per_second, burst_bytes=self._logs.burst_bytes
            )
        return plan

    def _mounts(self, sandbox: Sandbox, config: ContainerConfig, shared: Path) -> list[Mount]:
        planned = mounts.container_mounts(
            sandbox,
            config,
            shared,
            self._hierarchies,
            self._volume_layers,
            rejected=self._rejected,
        )
        return cgroup_mounts.requested(planned, config)

    def _process(
        self,
        sandbox: Sandbox,
        config: ContainerConfig,
        image: Image,
        inputs: HostInputs,
        selinux: str,
    ) -> ProcessPlan:
        plan = ProcessPlan(
            env=process.environment(config, image.config, etc_files.hostname(sandbox.config)),
            cwd=config.working_dir or image.config.working_dir or "/",
            user=process.user(config, image.config),
            capabilities=self._capabilities(config),
            no_new_privs=config.no_new_privs,
            seccomp=base64.b64encode(inputs.seccomp.program).decode(),
            seccomp_flags=inputs.seccomp.flags,
            apparmor=inputs.apparmor,
            selinux=selinux,
            rlimits=self._rlimits,
            oom_score_adj=config.resources.oom_score_adj,
            umask=UMASK,
            forbidden_calls=list(seccomp_successor.forbidden(inputs.seccomp.program)),
        )
        mapping = sandbox.config.namespaces.user_mapping
        if mapping is not None:
            plan["uid_map"] = [mounts.id_map(line) for line in mapping.uids]
            plan["gid_map"] = [mounts.id_map(line) for line in mapping.gids]
        return plan

    def _capabilities(self, config: ContainerConfig) -> Capabilities:
        return process.capability_sets(config.capabilities, privileged=config.privileged)

    def mount_statuses(self, config: ContainerConfig) -> tuple[MountStatus, ...]:
        """The requested mounts, with the id of each image volume that PullImage returned."""
        return tuple(
            MountStatus(config=mount, image_ref=self._volume(mount.image).id if mount.image else "")
            for mount in config.mounts
        )

    def images(self, config: ContainerConfig, image: Image) -> list[Image]:
        """The images that the container uses: its own and those of its volumes."""
        return [image, *(self._volume(mount.image) for mount in config.mounts if mount.image)]

    def _volume_layers(self, name: str) -> Sequence[Path]:
        return self._images.lower_dirs(self._volume(name))

    def _volume(self, name: str) -> Image:
        image = self._images.find(name)
        if image is None:
            raise NotFound(f'image volume "{name}": not on this node; pull it first')
        return image

    def _pid_target(self, sandbox: Sandbox, config: ContainerConfig) -> str:
        if config.namespaces.pid != "target":
            return ""
        target = self._inventory.container(config.namespaces.target)
        if target.sandbox_id != sandbox.id:
            raise InvalidArgument(f'target container "{target.id}": in another pod')
        if target.state == "exited":
            raise InvalidArgument(f'target container "{target.id}": has ended')
        return target.id


def reference(image: Image) -> str:
    """The repo digest of an image, or the id of one that has none."""
    return image.repo_digests[0] if image.repo_digests else image.id


def _restricted_paths(config: ContainerConfig) -> tuple[list[str], list[str]]:
    """The paths that are masked, and those that are read-only: the request's, else the defaults; none if privileged."""
    if config.privileged:
        return [], []
    masked = mounts.masked_paths() if config.masked_paths is None else config.masked_paths
    readonly = mounts.READONLY_PATHS if config.readonly_paths is None else config.readonly_paths
    return list(masked), list(readonly)
