"""CreateContainer, StartContainer, StopContainer, RemoveContainer and their kin: what they mean, without the wire.

A container record without `created_at` is an intention: it is written before the cgroup, the directory or the process
exists, and goes after they are gone.
"""

import asyncio
import base64
import json
import logging
import os
import secrets
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from nodeagent import files, records
from nodeagent.cgroups.group import Cgroup
from nodeagent.cgroups.manager import Cgroups
from nodeagent.cgroups.stats import CgroupStats
from nodeagent.errors import (
    AlreadyExists,
    FailedPrecondition,
    NodeAgentError,
    NotFound,
    StartError,
    Unavailable,
)
from nodeagent.images.catalog import Images
from nodeagent.lifecycle.containers import exec_sync, oom_kill, oom_score, unkillable
from nodeagent.lifecycle.flights import Flights
from nodeagent.lifecycle.inventory import Inventory
from nodeagent.lifecycle.plan import bundle, cgroup_mounts, process
from nodeagent.lifecycle.plan.cdi import Cdi
from nodeagent.lifecycle.plan.host_paths import HostPaths
from nodeagent.lifecycle.plan.planner import Planner, reference
from nodeagent.lifecycle.supervisors.handover import handover
from nodeagent.lifecycle.supervisors.supervision import Supervision, pauses
from nodeagent.lifecycle.trash import Trash
from nodeagent.records import Container, ContainerConfig, Image, Resources, Sandbox
from nodeagent.sandbox.agent.client import Supervisor
from nodeagent.sandbox.seccomp import effective as seccomp_effective
from nodeagent.sandbox.spec import ContainerPlan

log = logging.getLogger(__name__)

KILL_PATIENCE_SECONDS = 10.0
THAW_AFTER_SECONDS = 1.0
START_SECONDS = 1.0  # of a program that nobody holds up, it takes some milliseconds
ANSWER_SECONDS = 2.0
USUAL_PERIOD_USEC = 100_000  # the kernel's


class Containers:
    """The verbs of a container. All take an id or a unique prefix of it."""

    def __init__(
        self,
        *,
        inventory: Inventory,
        supervision: Supervision,
        images: Images,
        cgroups: Cgroups,
        planner: Planner,
        cdi: Cdi,
        trash: Trash,
        directory: Path,
    ) -> None:
        self._inventory = inventory
        self._supervision = supervision
        self._images = images
        self._cgroups = cgroups
        self._planner = planner
        self._cdi = cdi
        self._host_paths = HostPaths()
        self._trash = trash
        self._directory = directory
        self._groups: dict[str, Cgroup] = {}
        # Containers whose program is about to be executed, or is held up before that.
        self._starting: set[str] = set()
        # Warnings that hold for every container: no more than there are limits, capabilities and scores.
        self._said_of_all: set[str] = set()
        self._flights = Flights(lambda container_id: container_id in inventory.containers)

    def get(self, name: str) -> Container:
        """Raises NotFound."""
        return self._inventory.container(name)

    def list(self) -> list[Container]:
        return self._inventory.visible_containers()

    def verbose(self, name: str) -> dict[str, Any]:
        """The plan that its supervisor executed; empty when that is gone.

        The seccomp program is described by what it does: the names of system calls by action.
        """
        container = self._inventory.container(name)
        try:
            data = (self._directory / container.id / "plan.json").read_bytes()
        except FileNotFoundError:
            return {}
        plan: dict[str, Any] = msgspec.json.decode(data)
        program = base64.b64decode(plan["process"]["seccomp"])
        plan["process"]["seccomp"] = seccomp_effective.describe(program)
        plan.get("hooks", {}).pop("config", None)  # the same again, in other words
        return plan

    def of(self, sandbox_id: str) -> tuple[Container, ...]:
        """The containers of a pod, oldest first."""
        return tuple(c for c in self._inventory.members(sandbox_id) if c.created_at)

    def group(self, container: Container) -> Cgroup:
        """The container's cgroup, which exists from its creation to its end."""
        group = self._groups.get(container.id)
        if group is None:
            group = self._groups[container.id] = self._cgroups.open_existing(container.cgroup_path)
        return group

    # --- create ---

    async def create(self, sandbox_name: str, config: ContainerConfig) -> str:
        """Prepare everything up to the program, which `start` executes; returns the id.

        A retry with the same name and attempt joins a call that its caller gave up.
        """
        sandbox = self._inventory.sandbox(sandbox_name)
        key = (sandbox.id, config.name, config.attempt)
        what = f'container "{config.name}" of pod sandbox "{sandbox.id}"'
        return await self._flights.join(key, what, lambda: self._create(sandbox, config))

    async def _create(self, sandbox: Sandbox, config: ContainerConfig) -> str:
        pod = self._inventory.pods.get(sandbox.id)
        if pod is None:
            raise FailedPrecondition(f'pod sandbox "{sandbox.id}": is stopped')
        self._refuse_twin(sandbox, config)
        with pod.creation(sandbox.id) as supervisor:
            config = await self._with_devices(sandbox, config)
            image = self._image(config)
            container = self._intention(sandbox, config, image)
            async with AsyncExitStack() as undo:
                self._inventory.save(container)
                undo.callback(self._inventory.forget, container)
                await self._make(sandbox, container, image, supervisor, undo)
                undo.pop_all()
        return container.id

    async def _with_devices(self, sandbox: Sandbox, config: ContainerConfig) -> ContainerConfig:
        """The config with what its CDI devices add. A hung directory of specifications holds up no other requests."""
        if not self._cdi.is_asked_for(config):
            return config
        userns = sandbox.config.namespaces.user
        in_userns = userns is not None and userns.mode == "pod"
        directories = self._cdi.directories
        what = f'container "{config.name}": CDI directories {", ".join(map(str, directories))}'
        inject = partial(self._cdi.inject, config, userns=in_userns)
        # All are read at once, behind one lock: the first one's name stands for them in the count of looks.
        place = str(directories[0]) if directories else "/"
        return await self._host_paths.look(what, place, inject)

    async def _make(
        self,
        sandbox: Sandbox,
        container: Container,
        image: Image,
        supervisor: Supervisor,
        undo: AsyncExitStack,
    ) -> None:
        seen = await self._planner.look(container.config)
        plan = self._planner.plan(sandbox, container, image, seen, self._directory / container.id)
        undo.callback(self._images.release, container.id)
        for needed in self._planner.images(container.config, image):
            self._images.hold(needed.id, container.id)
        undo.callback(self._trash.take, self._directory / container.id)
        _make_directory(self._directory / container.id, plan)
        # Its first process works for some milliseconds until it is ready, which takes seconds of a quota like "10m".
        quota = Resources(
            cpu_period_usec=container.resources.cpu_period_usec,
            cpu_quota_usec=container.resources.cpu_quota_usec,
        )
        unhurried = msgspec.structs.replace(container.resources, cpu_quota_usec=0)
        group = self._cgroups.create(container.cgroup_path, unhurried)
        undo.push_async_callback(self._remove_group, container)
        self._groups[container.id] = group
        if not sandbox.config.cgroup_parent:
            self.limit_pod(sandbox)
        group.set_devices(seen.devices.rules)
        undo.push_async_callback(supervisor.remove, container.id)
        with handover(group) as fds, oom_kill.named(container, group):
            made = await supervisor.create(plan, fds)
        bundle.require(plan)
        if quota.cpu_quota_usec:
            group.apply(quota)
        self._warn(container, made.warnings)
        identity = made.identity
        if cgroup_mounts.is_delegated(container.config):
            group.delegate(_uid_on_node(sandbox, identity["uid"]))
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
        """Log what an init warns of for the first container alone: the agent itself lacks it, and so do all others."""
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

    def _refuse_twin(self, sandbox: Sandbox, config: ContainerConfig) -> None:
        for other in self._inventory.members(sandbox.id):
            if (other.config.name, other.config.attempt) == (config.name, config.attempt):
                raise AlreadyExists(
                    f'container "{config.name}": attempt {config.attempt} in pod sandbox '
                    f'"{sandbox.id}" is {other.id}; remove it first, or use another attempt'
                )

    # --- start ---

    async def start(self, name: str) -> None:
        """Execute the program. Raises StartError, with the container EXITED, when it cannot be."""
        container_id = self._inventory.container(name).id
        async with self._inventory.lock(container_id):
            container = self._inventory.container(container_id)
            if container.state != "created":
                raise FailedPrecondition(f'container "{name}": is {container.state}, not created')
            self._starting.add(container_id)
            try:
                with oom_kill.named(container, self.group(container)):
                    at = await self._supervisor(container).start(container_id)
            except StartError as error:
                failed = records.start_failed(container, str(error), time.time_ns())
                self._supervision.ended_as(failed)
                raise
            finally:
                self._starting.discard(container_id)
            self._supervision.started(container, at)

    # --- stop ---

    async def stop(self, name: str, timeout_s: float) -> None:
        """Signal the container, and kill it after `timeout_s`. Success when it is gone or not running.

        The supervisor keeps the earliest deadline that anybody asked for, and keeps it without us.
        """
        try:
            container = self._inventory.container(name)
        except NotFound:
            return
        if container.id in self._starting:
            container = await self._end_start(container, timeout_s)
        if container.state != "running":
            return
        await self._ask_to_stop(container, timeout_s)
        if await self._ends_within(container, timeout_s + THAW_AFTER_SECONDS):
            return
        self.group(container).thaw()
        # The first process of its PID namespace may wait, uninterruptibly, for another one of the container.
        await asyncio.to_thread(self.group(container).kill)
        if not await self._ends_within(container, KILL_PATIENCE_SECONDS):
            raise TimeoutError(unkillable.explained(container, self.group(container)))

    async def _end_start(self, container: Container, timeout_s: float) -> Container:
        """Its record once its start is over. Another container may hold it up (SIGSTOP, ptrace): it is killed then.

        While poststart hooks run its program is running already, and has the caller's timeout to end.
        """
        try:
            async with asyncio.timeout(START_SECONDS), self._inventory.lock(container.id):
                pass
        except TimeoutError:
            may_run = any(hook.stage == "poststart" for hook in container.config.hooks)
            await self._ask_to_stop(container, timeout_s if may_run else 0)
            async with self._inventory.lock(container.id):
                pass
        return self._inventory.containers.get(container.id, container)

    async def _ask_to_stop(self, container: Container, timeout_s: float) -> None:
        """Have the supervisor do it; kill the container ourselves, when its time is over, if that does not answer.

        Who is in the middle of splice(2) to or from a pipe holds its lock, for as long as the other side takes, and
        whoever reads the pipe waits for that without hearing signals: a container can hold its supervisor up so. It
        lets go when it is killed.
        """
        supervisor = self._supervisor(container)
        try:
            async with asyncio.timeout(timeout_s + ANSWER_SECONDS):
                await supervisor.stop(container.id, container.stop_signal, round(timeout_s * 1000))
        except TimeoutError:
            log.warning('container "%s": its supervisor does not answer; killed', container.id)
            await asyncio.to_thread(self.group(container).kill)

    async def _ends_within(self, container: Container, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._supervision.ended(container.id)
        except TimeoutError:
            return False
        return True

    async def stop_all(self, sandbox_id: str) -> None:
        """Kill every container of a pod, all at once; raises when one of them would not end.

        What cannot be asked of a supervisor that has died is left to the end of the pod.
        """
        members = self._inventory.members(sandbox_id)
        running = [c for c in members if c.state == "running" or c.id in self._starting]
        results = await asyncio.gather(
            *(self.stop(container.id, 0) for container in running), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, Unavailable):
                raise result

    # --- remove ---

    async def remove(self, name: str) -> None:
        """Kill the container if it runs, and forget it. Idempotent."""
        try:
            container = self._inventory.container(name)
        except NotFound:
            return
        await self.stop(container.id, 0)
        async with self._inventory.lock(container.id):
            if container.id in self._inventory.containers:
                await self.clear(self._inventory.containers[container.id])

    async def clear(self, container: Container) -> None:
        """Remove what a container that does not run has made, finished or not, then its record."""
        pod = self._inventory.pods.get(container.sandbox_id)
        if pod is not None and pod.supervisor is not None:
            await pod.supervisor.remove(container.id)
        await self._remove_group(container)
        self._trash.take(self._directory / container.id)
        self._images.release(container.id)
        self._inventory.forget(container)

    async def undo(self, container: Container) -> None:
        """Remove what a creation has made that an earlier agent did not finish, trying again until that succeeds.

        Until then the container keeps its record, and with it its name.
        """
        between = pauses()
        while container.id in self._inventory.containers:
            try:
                await self.clear(container)
            except (NodeAgentError, OSError) as error:
                log.error('container "%s": what was made of it is left: %s', container.id, error)
                await asyncio.sleep(next(between))

    async def clear_stranger(self, container_id: str) -> None:
        """Remove what there is of a container without a record, of whichever pod it was."""
        parents = {sandbox.cgroup_parent for sandbox in self._inventory.sandboxes.values()}
        for parent in parents:
            with suppress(NotFound):
                path = self._cgroups.container_path(parent, container_id)
                await asyncio.to_thread(_end, self._cgroups.open_existing(path))
        self._trash.take(self._directory / container_id)

    async def kill_all(self, sandbox_id: str) -> None:
        """Kill what runs of a pod that has no supervisor and gets none."""
        for container in self._inventory.members(sandbox_id):
            try:
                await asyncio.to_thread(self.group(container).kill)
            except (NodeAgentError, OSError) as error:
                log.error('container "%s": not killed: %s', container.id, error)

    def pod_stats(self, sandbox: Sandbox) -> CgroupStats:
        """Of the cgroup above a pod's containers. Raises NotFound: it is made with the first of them."""
        group = self._cgroups.open_existing(sandbox.cgroup_parent)
        try:
            return group.stats()
        finally:
            group.close()

    def limit_pod(self, sandbox: Sandbox) -> None:
        """Enforce a pod's own limits on the cgroup above its containers, which is made with the first of them.

        Raises NotFound for one that is the caller's to make.
        """
        if sandbox.config.resources is None:
            return
        try:
            group = self._cgroups.open_existing(sandbox.cgroup_parent)
        except NotFound:
            if sandbox.config.cgroup_parent:
                raise
            return
        group.apply(total(sandbox.config.resources, sandbox.config.overhead or Resources()))

    async def _remove_group(self, container: Container) -> None:
        """The group stays known until it is gone, or who asks for its usage meanwhile would open it again for good."""
        try:
            group = self.group(container)
        except NotFound:
            await asyncio.to_thread(self._cgroups.remove, container.cgroup_path)
            return
        await asyncio.to_thread(_end, group)
        self._groups.pop(container.id, None)

    # --- running containers ---

    async def update(self, name: str, resources: Resources) -> None:
        """Put new limits in force, all or none, and remember them; 0 and empty leave a limit as it is."""
        container_id = self._inventory.container(name).id
        async with self._inventory.lock(container_id):
            container = self._inventory.container(container_id)
            if container.state == "exited":
                raise FailedPrecondition(f'container "{name}": is exited')
            group, old = self.group(container), container.resources
            with oom_score.changed(group.processes, old.oom_score_adj, resources.oom_score_adj):
                group.apply(resources)
            merged = records.updated(old, resources)
            self._inventory.save(msgspec.structs.replace(container, resources=merged))

    async def exec_sync(
        self, name: str, argv: tuple[str, ...], timeout_s: float
    ) -> exec_sync.ExecResult:
        """Run a command in a running container to its end; see `execs.exec_sync`."""
        container, supervisor = self.running(name)
        group = self.group(container)
        return await exec_sync.exec_sync(supervisor, group, container, argv, timeout_s)

    async def reopen_log(self, name: str) -> None:
        """After this the log file exists anew, and no byte goes to the old one."""
        container, supervisor = self.running(name)
        await supervisor.reopen_log(container.id)

    def running(self, name: str) -> tuple[Container, Supervisor]:
        """A container that runs, and who supervises it. Raises FailedPrecondition for one that does not."""
        container = self._inventory.container(name)
        if container.state != "running":
            raise FailedPrecondition(f'container "{name}": is {container.state}, not running')
        return container, self._supervisor(container)

    def _supervisor(self, container: Container) -> Supervisor:
        pod = self._inventory.pods.get(container.sandbox_id)
        if pod is None or pod.supervisor is None:
            raise FailedPrecondition(f'container "{container.id}": its pod is stopped')
        return pod.supervisor

    async def close(self) -> None:
        """Undo what is under way."""
        await self._flights.close()


def _make_directory(directory: Path, plan: ContainerPlan) -> None:
    """The container's own directory, for root alone: in `upper` there may be set-user-ID programs and devices.

    `upper` itself is the root directory of the container, for all users in it.
    """
    directory.mkdir(mode=0o700)
    for name, mode in (("upper", 0o755), ("work", 0o700)):
        files.ensure_directory(str(directory / name), mode)
    readable = json.dumps(plan, ensure_ascii=False).encode(errors="replace")
    with open(directory / "plan.json", "xb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(readable)


def _end(group: Cgroup) -> None:
    """Also of processes that no supervisor knew of."""
    if group.populated():
        group.kill()
    group.remove()


def total(resources: Resources, overhead: Resources) -> Resources:
    """What a pod may use: its containers' sum and the overhead, where the containers have a limit."""
    period = resources.cpu_period_usec or USUAL_PERIOD_USEC
    quota = overhead.cpu_quota_usec * period // (overhead.cpu_period_usec or USUAL_PERIOD_USEC)
    more = {
        "cpu_quota_usec": quota,
        "cpu_shares": overhead.cpu_shares,
        "memory_limit_bytes": overhead.memory_limit_bytes,
    }
    added = {
        name: limit + max(0, more[name]) for name in more if (limit := getattr(resources, name)) > 0
    }
    return msgspec.structs.replace(resources, **added)


def _uid_on_node(sandbox: Sandbox, uid: int) -> int:
    """The id that a user of a container has on the node."""
    user = sandbox.config.namespaces.user
    return user.uids[0].outside + uid if user is not None and user.mode == "pod" else uid
