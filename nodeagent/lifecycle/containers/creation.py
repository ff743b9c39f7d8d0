"""CreateContainer: from a request to a process that has done everything but execute its program.

A container record without `created_at` is an intention: it is written before the cgroup, the directory or the process
exists, and goes after they are gone.
"""

import logging
import secrets
import time
from collections.abc import Sequence
from functools import partial

import msgspec

from nodeagent.cgroups.manager import Cgroups
from nodeagent.errors import (
    AlreadyExists,
    FailedPrecondition,
    NotFound,
    Unavailable,
)
from nodeagent.images.catalog import Images
from nodeagent.lifecycle.containers import held_up, oom_at_start
from nodeagent.lifecycle.containers.directories import Directories
from nodeagent.lifecycle.containers.groups import Groups
from nodeagent.lifecycle.containers.removal import Removal
from nodeagent.lifecycle.creations import PATIENCE_SECONDS, Creations, doing
from nodeagent.lifecycle.inventory import Inventory
from nodeagent.lifecycle.plan import bundle, cgroup_mounts, process
from nodeagent.lifecycle.plan.cdi import Cdi
from nodeagent.lifecycle.plan.host_paths import HostPaths
from nodeagent.lifecycle.plan.planner import Planner, reference
from nodeagent.lifecycle.supervisors.cgroup_files import supervisor_files
from nodeagent.records import Container, Image, Sandbox
from nodeagent.requests import ContainerConfig, Resources
from nodeagent.sandbox.agent.client import Supervisor
from nodeagent.tasks import Tasks

log = logging.getLogger(__name__)


class Creation:
    """Creates containers; creations under way are undone by `close`."""

    def __init__(
        self,
        *,
        inventory: Inventory,
        images: Images,
        cgroups: Cgroups,
        groups: Groups,
        planner: Planner,
        cdi: Cdi,
        removal: Removal,
        directories: Directories,
        tasks: Tasks,
        patience_s: float = PATIENCE_SECONDS,
    ) -> None:
        """Take the parts. patience_s: of whoever waits for a creation."""
        self._inventory = inventory
        self._images = images
        self._cgroups = cgroups
        self._groups = groups
        self._planner = planner
        self._cdi = cdi
        self._host_paths = HostPaths()
        self._removal = removal
        self._directories = directories
        self._under_way: set[str] = set()
        # Warnings that hold for every container: no more than there are limits, capabilities and scores.
        self._said_of_all: set[str] = set()
        self._creations = Creations(
            tasks,
            "container creation",
            lambda container_id: container_id in inventory.containers,
            patience_s,
        )

    async def create(self, sandbox_name: str, config: ContainerConfig) -> str:
        """Prepare everything up to the program, which `start` executes; returns the id.

        A retry with the same name and attempt joins a call that its caller gave up.
        """
        sandbox = self._inventory.sandbox(sandbox_name)
        key = (sandbox.id, config.name, config.attempt)
        what = f'container "{config.name}" of pod sandbox "{sandbox.id}"'
        return await self._creations.join(key, what, lambda: self._create(sandbox, config))

    async def _create(self, sandbox: Sandbox, config: ContainerConfig) -> str:
        pod = self._inventory.pods.get(sandbox.id)
        if pod is None:
            raise FailedPrecondition(f'pod sandbox "{sandbox.id}": is stopped')
        # No other creation of this name comes between the check and the record: there is one per key.
        self._refuse_duplicate(sandbox, config)
        with pod.creation(sandbox.id) as supervisor:
            await supervisor.agree()  # before anything is made, which it could not undo
            config = await self._with_devices(sandbox, config)
            image = self._image(config)
            container = self._intention(sandbox, config, image)
            self._under_way.add(container.id)
            try:
                self._inventory.save(container)
                try:
                    await self._make(sandbox, container, image, supervisor)
                except BaseException:
                    await self._removal.undo(container)
                    raise
            finally:
                self._under_way.discard(container.id)
        return container.id

    def is_under_way(self, container_id: str) -> bool:
        """Whether a container is being made, or what was made of it is being undone."""
        return container_id in self._under_way or self._removal.why_left(container_id) is not None

    async def _with_devices(self, sandbox: Sandbox, config: ContainerConfig) -> ContainerConfig:
        """The config with what its CDI devices add. A hung directory of specifications blocks no other requests."""
        if not self._cdi.is_asked_for(config):
            return config
        in_userns = sandbox.config.namespaces.user_mapping is not None
        directories = self._cdi.directories
        what = f'container "{config.name}": CDI directories {", ".join(map(str, directories))}'
        inject = partial(self._cdi.inject, config, userns=in_userns)
        # All are read at once, behind one lock: the first one's name stands for them in the count of lookups.
        place = str(directories[0]) if directories else "/"
        return await self._host_paths.look_up(what, place, inject)

    async def _make(
        self,
        sandbox: Sandbox,
        container: Container,
        image: Image,
        supervisor: Supervisor,
    ) -> None:
        inputs = await self._planner.resolve(container.config)
        plan = self._planner.plan(
            sandbox, container, image, inputs, self._directories.path(container.id)
        )
        for needed in self._planner.images(container.config, image):
            self._images.hold(needed.id, container.id)
        await self._directories.make(container.id)
        # Its first process works for some milliseconds until it is ready, which takes seconds of a quota like "10m".
        quota = Resources(
            cpu_period_usec=container.resources.cpu_period_usec,
            cpu_quota_usec=container.resources.cpu_quota_usec,
        )
        unhurried = msgspec.structs.replace(container.resources, cpu_quota_usec=0)
        group = self._groups.create(container, unhurried)
        if not sandbox.config.cgroup_parent:
            self._groups.limit_pod(sandbox)
        group.set_devices(inputs.devices.rules)  # before any process is in it
        paths = [mount.host_path for mount in container.config.mounts if mount.host_path]
        doing(
            f"waiting for its supervisor, which mounts {', '.join(paths) or 'its root filesystem'}",
            partial(held_up.why, supervisor, group),
        )
        with supervisor_files(group) as fds, oom_at_start.named(container, group):
            made = await supervisor.create(plan, fds)
        bundle.require(plan)
        if quota.cpu_quota_usec:
            group.apply(quota)
        self._warn(container, made.warnings)
        identity = made.identity
        if cgroup_mounts.is_delegated(container.config):
            uid, _ = sandbox.config.namespaces.on_node(identity["uid"], identity["gid"])
            group.delegate(uid)
        self._inventory.save(
            msgspec.structs.replace(
                container,
                created_at=time.time_ns(),
                pid=made.pid,
                uid=identity["uid"],
                gid=identity["gid"],
                groups=tuple(identity["groups"]),
            ),
            "created",
        )

    def _warn(self, container: Container, warnings: Sequence[str]) -> None:
        """Log an init's warnings for the first container only: the agent lacks a right, and so do all others."""
        for warning in warnings:
            if warning not in self._said_of_all:
                self._said_of_all.add(warning)
                log.warning(
                    'container "%s": %s; not repeated for other containers', container.id, warning
                )

    def _intention(self, sandbox: Sandbox, config: ContainerConfig, image: Image) -> Container:
        container_id = secrets.token_hex(32)
        log_path = ""
        if sandbox.config.log_directory and config.log_path:
            log_path = f"{sandbox.config.log_directory}/{config.log_path}"
        return Container(
            id=container_id,
            sandbox_id=sandbox.id,
            config=config,
            image_id=image.id,
            image_ref=reference(image),
            image_name=config.image_user_specified or config.image,
            mounts=self._planner.mount_statuses(config),
            cgroup_path=self._cgroups.container_path(sandbox.cgroup_parent, container_id),
            log_path=log_path,
            resources=config.resources,
            stop_signal=process.stop_signal(config, image.config),
        )

    def _image(self, config: ContainerConfig) -> Image:
        image = self._images.find(config.image)
        if image is None:
            raise NotFound(f'image "{config.image}": not on this node; pull it first')
        return image

    def _refuse_duplicate(self, sandbox: Sandbox, config: ContainerConfig) -> None:
        for other in self._inventory.members(sandbox.id):
            if (other.config.name, other.config.attempt) == (config.name, config.attempt):
                if not other.created_at:
                    why = self._removal.why_left(other.id) or "an earlier agent has left it"
                    raise Unavailable(
                        f'container "{config.name}": an earlier creation of attempt {config.attempt} in pod sandbox '
                        f'"{sandbox.id}" is still being undone: {why}'
                    )
                raise AlreadyExists(
                    f'container "{config.name}": attempt {config.attempt} in pod sandbox '
                    f'"{sandbox.id}" is {other.id}; remove it first, or use another attempt'
                )

    async def close(self) -> None:
        """Undo what is under way."""
        await self._creations.close()
        await self._removal.close()
