"""The node: everything that the API serves, put together, recovered, and taken apart again.

`open_node` gives it when the agent may serve: what ran before is taken over, what was cut off is undone.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nodeagent.cgroups.manager import Cgroups
from nodeagent.config import Config
from nodeagent.images.catalog import Images, Limits
from nodeagent.images.profiles import SecurityProfiles
from nodeagent.images.remote.client import Session, open_session
from nodeagent.lifecycle import private_mount
from nodeagent.lifecycle.containers.containers import Containers
from nodeagent.lifecycle.containers.creation import Creation
from nodeagent.lifecycle.containers.groups import Groups
from nodeagent.lifecycle.containers.stopping import Stopping
from nodeagent.lifecycle.events import Events
from nodeagent.lifecycle.health import Health
from nodeagent.lifecycle.inventory import Inventory
from nodeagent.lifecycle.places import Places
from nodeagent.lifecycle.plan import apparmor
from nodeagent.lifecycle.plan.cdi import Cdi
from nodeagent.lifecycle.plan.planner import Planner
from nodeagent.lifecycle.plan.profiles import Profiles, check_artifact
from nodeagent.lifecycle.pods.sandboxes import Sandboxes
from nodeagent.lifecycle.pods.slots import Slots
from nodeagent.lifecycle.recovery import Recovery
from nodeagent.lifecycle.sessions import Sessions
from nodeagent.lifecycle.supervisors.handover import joining_files
from nodeagent.lifecycle.supervisors.launchers import Launchers
from nodeagent.lifecycle.supervisors.supervision import Supervision
from nodeagent.lifecycle.usage.stats import Stats
from nodeagent.net.network import Network
from nodeagent.sandbox.agent.client import Launcher
from nodeagent.store import Store
from nodeagent.tasks import Tasks
from nodeagent.trash import Trash

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatus:
    """The two conditions of the CRI. An empty reason belongs to a condition that holds.

    network_problems: further problems of the network, in either case.
    """

    runtime_ready: bool
    runtime_reason: str
    runtime_message: str
    network_ready: bool
    network_reason: str
    network_message: str
    network_problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """The parts of the node that the API serves, by what they do."""

    config: Config
    places: Places
    version: str
    sandboxes: Sandboxes
    containers: Containers
    creation: Creation
    stopping: Stopping
    groups: Groups
    images: Images
    artifacts: SecurityProfiles
    stats: Stats
    events: Events
    sessions: Sessions
    slots: Slots
    network: Network
    cgroups: Cgroups
    launchers: Launchers
    inventory: Inventory
    supervision: Supervision
    health: Health
    tasks: Tasks

    async def status(self) -> NodeStatus:
        """The conditions, checked now and not cached; answers within a second or two, whatever hangs."""
        network = self.network.status()
        trouble = await self.health.trouble()
        return NodeStatus(
            runtime_ready=not trouble.reason,
            runtime_reason=trouble.reason,
            runtime_message=trouble.message,
            network_ready=network.ready,
            network_reason=network.reason,
            network_message=network.message or "; ".join(network.problems),
            network_problems=network.problems,
        )

    @property
    def busy(self) -> bool:
        """Whether a pod is READY, which is what an ending agent leaves behind."""
        return any(sandbox.ready for sandbox in self.sandboxes.list())


@asynccontextmanager
async def open_images(config: Config, places: Places) -> AsyncIterator[tuple[Store, Images]]:
    """The store and the images of a root directory, which the caller owns."""
    async with (
        Tasks() as tasks,
        open_session() as session,
        _opened(config, places, session, tasks) as (store, images),
    ):
        yield store, images


@asynccontextmanager
async def _opened(
    config: Config, places: Places, session: Session, tasks: Tasks
) -> AsyncIterator[tuple[Store, Images]]:
    store = Store.open(places.database)
    try:
        images = await Images.open(
            root=places.root,
            store=store,
            hosts_dir=Path(config.certs_dir),
            session=session,
            tasks=tasks,
            pinned=config.images.pinned,
            limits=Limits(
                layers_at_once=config.images.max_concurrent_downloads,
                max_image_bytes=config.images.max_image_bytes,
                max_image_entries=config.images.max_image_entries,
                private_redirects=config.images.private_redirects,
            ),
        )
        try:
            yield store, images
        finally:
            await images.close()
    finally:
        store.close()


@asynccontextmanager
async def open_node(config: Config) -> AsyncIterator[Node]:
    """The node of a root directory. On leaving, running pods stay; without one, nothing of it stays."""
    places = Places.of(config)
    profiles = Profiles(config.seccomp.default_profile)
    profiles.check_default()
    async with AsyncExitStack() as stack:
        stack.enter_context(places.owned())  # before anything is made: a second agent ends here
        places.make()
        if places.is_earlier:
            log.warning(
                "%s: has pods of an earlier version, and stays in use until an agent has ended without one; "
                "sockets are in %s now",
                places.home,
                places.state,
            )
        stack.enter_context(private_mount.mounted(places.pods))
        await asyncio.to_thread(apparmor.prepare)
        tasks = await stack.enter_async_context(Tasks())
        # One for images and profiles: a registry that asked for a pause is left alone by both.
        session = await stack.enter_async_context(open_session())
        store, images = await stack.enter_async_context(_opened(config, places, session, tasks))
        artifacts = await SecurityProfiles.open(
            root=places.root,
            store=store,
            hosts_dir=Path(config.certs_dir),
            session=session,
            tasks=tasks,
            check=check_artifact,
            private_redirects=config.images.private_redirects,
        )
        stack.push_async_callback(artifacts.close)
        cgroups = Cgroups.open(
            driver=config.cgroup.driver,
            default_parent=config.cgroup.parent or f"/nodeagent-{places.instance}",
        )
        network = await Network.start(
            config=config.network, store=store, instance=places.instance, tasks=tasks
        )
        trash = Trash(places.trash, "trash", tasks)
        stack.push_async_callback(trash.close)
        launchers = Launchers(partial(_launcher, cgroups, places), tasks)
        node = _assemble(
            config,
            places,
            profiles,
            store,
            images,
            artifacts,
            cgroups,
            network,
            launchers,
            trash,
            tasks,
        )
        stack.push_async_callback(node.supervision.close)
        await _recovery(node, places).run()
        node.launchers.start()
        node.slots.start()
        try:
            yield node
        finally:
            await _end(node)


def _assemble(
    config: Config,
    places: Places,
    profiles: Profiles,
    store: Store,
    images: Images,
    artifacts: SecurityProfiles,
    cgroups: Cgroups,
    network: Network,
    launchers: Launchers,
    trash: Trash,
    tasks: Tasks,
) -> Node:
    events = Events()
    inventory = Inventory(store, events)
    supervision = Supervision(inventory, launchers, places.pods, tasks)
    groups = Groups(cgroups)
    creation = Creation(
        inventory=inventory,
        images=images,
        cgroups=cgroups,
        groups=groups,
        planner=Planner(inventory, images, cgroups, profiles, artifacts, config, pods=places.pods),
        cdi=Cdi([Path(each) for each in config.cdi.directories], config.cdi.hook_programs),
        trash=trash,
        directory=places.containers,
        tasks=tasks,
    )
    stopping = Stopping(inventory, supervision, groups)
    containers = Containers(
        inventory=inventory,
        supervision=supervision,
        images=images,
        groups=groups,
        stopping=stopping,
        trash=trash,
        directory=places.containers,
        pods=places.pods,
    )
    slots = Slots(launchers, network, places.pods, config.slots, tasks)
    sandboxes = Sandboxes(
        inventory=inventory,
        slots=slots,
        network=network,
        containers=containers,
        stopping=stopping,
        groups=groups,
        supervision=supervision,
        cgroups=cgroups,
        directory=places.pods,
        handlers=config.handlers,
        tasks=tasks,
    )
    return Node(
        config=config,
        places=places,
        version=version("nodeagent"),
        sandboxes=sandboxes,
        containers=containers,
        creation=creation,
        stopping=stopping,
        groups=groups,
        images=images,
        artifacts=artifacts,
        stats=Stats(inventory, containers, groups, network, places.containers, tasks),
        events=events,
        sessions=Sessions(inventory, containers, groups, supervision, tasks),
        slots=slots,
        network=network,
        cgroups=cgroups,
        launchers=launchers,
        inventory=inventory,
        supervision=supervision,
        health=Health(places, cgroups, launchers, store, tasks),
        tasks=tasks,
    )


def _recovery(node: Node, places: Places) -> Recovery:
    return Recovery(
        inventory=node.inventory,
        supervision=node.supervision,
        containers=node.containers,
        stopping=node.stopping,
        network=node.network,
        images=node.images,
        launchers=node.launchers,
        cgroups=node.cgroups,
        places=places,
    )


async def _launcher(cgroups: Cgroups, places: Places) -> Launcher:
    """The launcher that runs, or a new one in the agent's own cgroup."""
    with joining_files(cgroups.instance_group()) as files:
        return await Launcher.connect_or_start(places.home, join_fds=files)


async def _end(node: Node) -> None:
    """Take the parts down, each of them even if an earlier one has failed.

    Each step is a task, so that the log can name the one that does not end.
    """
    async with AsyncExitStack() as steps:
        steps.push_async_callback(_step, node, partial(_leave, node))
        # In reverse order: streams end first, and a launcher is there for what is undone.
        for part in (node.launchers, node.slots, node.creation, node.sandboxes, node.sessions):
            steps.push_async_callback(_step, node, part.close)


async def _step(node: Node, close: Callable[[], Coroutine[Any, Any, None]]) -> None:
    await node.tasks.start("end", close())


async def _leave(node: Node) -> None:
    """Leave launcher, supervisors, links and cgroups to the next agent, or remove them if no pod is READY."""
    busy = node.busy
    await node.network.close(remove=not busy)
    if busy:
        return
    launcher = await node.launchers.get()
    for stray in await launcher.pods():
        log.error('pod "%s": no sandbox record refers to it; killing its supervisor', stray)
        await launcher.abandon(stray)
    await launcher.stop()
    node.cgroups.remove_instance()
