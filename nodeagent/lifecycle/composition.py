"""The composition of a node: its parts are opened, put together, recovered, and taken apart again.

`open_node` gives it when the agent may serve: what ran before is taken over, what was cut off is undone.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from nodeagent.cgroups.manager import Cgroups
from nodeagent.config import Config
from nodeagent.images.catalog import Images, Limits
from nodeagent.images.profiles import SecurityProfiles
from nodeagent.images.remote.client import Session, open_session
from nodeagent.lifecycle import private_mount
from nodeagent.lifecycle.containers.containers import Containers
from nodeagent.lifecycle.containers.creation import Creation
from nodeagent.lifecycle.containers.directories import Directories
from nodeagent.lifecycle.containers.groups import Groups
from nodeagent.lifecycle.containers.removal import Removal
from nodeagent.lifecycle.containers.stopping import Stopping
from nodeagent.lifecycle.events import Events
from nodeagent.lifecycle.health import Health
from nodeagent.lifecycle.inventory import Inventory
from nodeagent.lifecycle.node import Node
from nodeagent.lifecycle.places import Places
from nodeagent.lifecycle.plan import apparmor
from nodeagent.lifecycle.plan.cdi import Cdi
from nodeagent.lifecycle.plan.planner import Planner
from nodeagent.lifecycle.plan.profiles import Profiles, check_artifact
from nodeagent.lifecycle.pods.sandboxes import Sandboxes
from nodeagent.lifecycle.pods.slots import Slots, remove_killed
from nodeagent.lifecycle.reconcile import Reconciliation
from nodeagent.lifecycle.recovery import Recovery
from nodeagent.lifecycle.sessions import Sessions
from nodeagent.lifecycle.supervisors.cgroup_files import joining_files
from nodeagent.lifecycle.supervisors.launchers import Launchers
from nodeagent.lifecycle.supervisors.polling import Polling
from nodeagent.lifecycle.supervisors.supervision import Supervision
from nodeagent.lifecycle.usage.stats import Stats
from nodeagent.net.network import Network
from nodeagent.sandbox.agent.client import Launcher
from nodeagent.sandbox.agent.connector import SOCKETS, Connector
from nodeagent.store import Store
from nodeagent.tasks import Tasks
from nodeagent.trash import Trash

log = logging.getLogger(__name__)


class Base(NamedTuple):
    """What the parts of a node stand on, in the order in which it is opened; it is closed the other way round."""

    config: Config
    places: Places
    profiles: Profiles
    tasks: Tasks
    store: Store
    images: Images
    artifacts: SecurityProfiles
    cgroups: Cgroups
    network: Network
    trash: Trash
    launchers: Launchers
    connector: Connector


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
    store = Store.open(places.database, places.journal)
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
        base = await _open_base(stack, config, places, profiles)
        yield await stack.enter_async_context(recovered(base))


@asynccontextmanager
async def recovered(base: Base) -> AsyncIterator[Node]:
    """The node on these parts, which are the caller's to close: put together, recovered, and at work until the end."""
    inventory = Inventory(base.store, Events())
    supervision = Supervision(
        inventory, base.launchers, base.places.pods, base.tasks, base.connector
    )
    async with AsyncExitStack() as stack:
        stack.push_async_callback(supervision.close)
        node = _assemble(base, inventory, supervision)
        recovery = Recovery(
            inventory=inventory,
            supervision=supervision,
            containers=node.containers,
            stopping=node.stopping,
            network=base.network,
            images=base.images,
            launchers=base.launchers,
            cgroups=base.cgroups,
            places=base.places,
        )
        await recovery.run()
        base.launchers.start()
        polling = Polling(inventory, supervision, base.tasks)
        stack.push_async_callback(polling.close)
        polling.start()
        node.reconciliation.dismantle = recovery.dismantle
        node.reconciliation.is_recovering = recovery.is_under_way
        stack.push_async_callback(node.reconciliation.close)
        node.reconciliation.start()
        node.slots.start()
        try:
            yield node
        finally:
            await _end(node, base.launchers)


async def _open_base(
    stack: AsyncExitStack, config: Config, places: Places, profiles: Profiles
) -> Base:
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
    default_parent = config.cgroup.parent or f"/nodeagent-{places.instance}"
    cgroups = Cgroups.open(driver=config.cgroup.driver, default_parent=default_parent)
    network = await Network.start(
        config=config.network, store=store, instance=places.instance, tasks=tasks
    )
    trash = Trash(places.trash, "trash", tasks)
    stack.push_async_callback(trash.close)
    launchers = Launchers(partial(reach_launcher, cgroups, places, SOCKETS), tasks)
    return Base(
        config,
        places,
        profiles,
        tasks,
        store,
        images,
        artifacts,
        cgroups,
        network,
        trash,
        launchers,
        SOCKETS,
    )


def _assemble(base: Base, inventory: Inventory, supervision: Supervision) -> Node:
    places, network, tasks = base.places, base.network, base.tasks
    groups = Groups(base.cgroups)
    stopping = Stopping(inventory, supervision, groups)
    directories = Directories(places.containers, base.trash)
    removal = Removal(inventory, groups, base.images, directories, base.tasks)
    containers = Containers(
        inventory=inventory,
        supervision=supervision,
        groups=groups,
        stopping=stopping,
        removal=removal,
        directories=directories,
        pods=places.pods,
    )
    slots = Slots(base.launchers, network, places.pods, base.config.slots, tasks)
    creation = _creation(base, inventory, groups, removal, directories)
    return Node(
        config=base.config,
        places=places,
        version=version("nodeagent"),
        sandboxes=_sandboxes(base, inventory, supervision, containers, stopping, groups, slots),
        containers=containers,
        creation=creation,
        stopping=stopping,
        groups=groups,
        images=base.images,
        artifacts=base.artifacts,
        stats=Stats(inventory, containers, groups, network, places.containers, tasks),
        events=inventory.events,
        sessions=Sessions(inventory, containers, groups, supervision, tasks),
        slots=slots,
        network=network,
        cgroups=base.cgroups,
        health=Health(places, base.cgroups, base.launchers, base.store, tasks),
        reconciliation=Reconciliation(
            inventory=inventory,
            launchers=base.launchers,
            slots=slots,
            creation=creation,
            containers=containers,
            network=network,
            images=base.images,
            cgroups=base.cgroups,
            places=places,
            tasks=tasks,
        ),
        tasks=tasks,
    )


def _creation(
    base: Base, inventory: Inventory, groups: Groups, removal: Removal, directories: Directories
) -> Creation:
    specifications = [Path(each) for each in base.config.cdi.directories]
    planner = Planner(
        inventory,
        base.images,
        base.cgroups,
        base.profiles,
        base.artifacts,
        base.config,
        pods=base.places.pods,
    )
    return Creation(
        inventory=inventory,
        images=base.images,
        cgroups=base.cgroups,
        groups=groups,
        planner=planner,
        cdi=Cdi(specifications, base.config.cdi.hook_programs),
        removal=removal,
        directories=directories,
        tasks=base.tasks,
    )


def _sandboxes(
    base: Base,
    inventory: Inventory,
    supervision: Supervision,
    containers: Containers,
    stopping: Stopping,
    groups: Groups,
    slots: Slots,
) -> Sandboxes:
    return Sandboxes(
        inventory=inventory,
        slots=slots,
        network=base.network,
        containers=containers,
        stopping=stopping,
        groups=groups,
        supervision=supervision,
        cgroups=base.cgroups,
        directory=base.places.pods,
        handlers=base.config.handlers,
        tasks=base.tasks,
    )


async def reach_launcher(cgroups: Cgroups, places: Places, connector: Connector) -> Launcher:
    """The launcher that runs, or a new one in the agent's own cgroup."""
    with joining_files(cgroups.instance_group()) as files:
        return await Launcher.connect_or_start(places.home, join_fds=files, connector=connector)


async def _end(node: Node, launchers: Launchers) -> None:
    """Take the parts down, each of them even if an earlier one has failed.

    Each step is a task, so that the log can name the one that does not end.
    """
    async with AsyncExitStack() as steps:
        steps.push_async_callback(_step, node, partial(_leave, node, launchers))
        # In reverse order: the reconciliation first, which would start another launcher once that has ended; streams;
        # and a launcher is there for what is undone.
        for part in (
            launchers,
            node.slots,
            node.creation,
            node.sandboxes,
            node.sessions,
            node.reconciliation,
        ):
            steps.push_async_callback(_step, node, part.close)


async def _step(node: Node, close: Callable[[], Coroutine[Any, Any, None]]) -> None:
    await node.tasks.start("end", close())


async def _leave(node: Node, launchers: Launchers) -> None:
    """Leave launcher, supervisors, links and cgroups to the next agent, or remove them if no pod is READY."""
    busy = node.busy
    await node.network.close(remove=not busy)
    if busy:
        return
    launcher = await launchers.get()
    for stray in await launcher.pods():
        log.error('pod "%s": no sandbox record refers to it; killing its supervisor', stray)
        await launcher.abandon(stray)
    await launcher.stop()
    # Of strays, slots, and pods whose creation is still being undone: it would keep the private mount of the directory.
    stopped = {sandbox.id for sandbox in node.sandboxes.list()}
    for directory in list(node.places.pods.iterdir()):
        if directory.name in stopped:
            continue
        try:
            await remove_killed(directory)
        except OSError as error:
            log.error('pod "%s": its directory cannot be removed: %s', directory.name, error)
    await node.reconciliation.end_groups()
    node.cgroups.remove_instance()
