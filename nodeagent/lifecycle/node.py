"""The node: everything that the API serves, put together, recovered, and taken apart again.

`open_node` gives it when the agent may serve: what ran before is taken over, what was cut off is undone.
"""

import fcntl
import hashlib
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from nodeagent import files
from nodeagent.cgroups.manager import Cgroups
from nodeagent.config import Config
from nodeagent.errors import AlreadyExists
from nodeagent.images.catalog import Images
from nodeagent.lifecycle.containers import Containers
from nodeagent.lifecycle.events import Events
from nodeagent.lifecycle.plan import Planner
from nodeagent.lifecycle.recovery import Recovery, boot_id
from nodeagent.lifecycle.registry import Registry
from nodeagent.lifecycle.sandboxes import Sandboxes
from nodeagent.lifecycle.slots import Slots
from nodeagent.lifecycle.stats import Stats
from nodeagent.lifecycle.supervision import Supervision
from nodeagent.lifecycle.trash import Trash
from nodeagent.linux import mounts
from nodeagent.net.network import Network
from nodeagent.sandbox.client import Launcher
from nodeagent.store import Store

HANDLERS = frozenset({""})


def instance_of(root: Path) -> str:
    """Eight hex digits that tell this agent's links, tables and cgroups from those of others on the machine."""
    return hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:8]


@contextmanager
def only_agent(config: Config) -> Iterator[None]:
    """Hold the lock of a root directory: two agents on one would undo each other's work."""
    root = Path(config.root)
    files.ensure_directory(root, mode=0o711)
    lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyExists(f"{root}: another agent runs on this root directory") from None
        yield
    finally:
        os.close(lock)


@asynccontextmanager
async def open_images(config: Config) -> AsyncIterator[tuple[Store, Images]]:
    """The store and the images of a root directory, which `only_agent` must hold."""
    root = Path(config.root)
    store = Store.open(root / "state.db")
    try:
        images = await Images.open(
            root=root, store=store, hosts_dir=Path(config.certs_dir), pinned=config.images.pinned
        )
        try:
            yield store, images
        finally:
            await images.close()
    finally:
        store.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatus:
    """The two conditions of the CRI. An empty reason belongs to a condition that holds."""

    runtime_ready: bool
    runtime_reason: str
    runtime_message: str
    network_ready: bool
    network_reason: str
    network_message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What the API serves. The verbs are in the parts."""

    config: Config
    version: str
    sandboxes: Sandboxes
    containers: Containers
    images: Images
    stats: Stats
    events: Events
    slots: Slots
    network: Network
    cgroups: Cgroups
    launcher: Launcher

    def status(self) -> NodeStatus:
        network = self.network.status()
        lost = self.launcher.lost.is_set()
        return NodeStatus(
            runtime_ready=not lost,
            runtime_reason="LauncherLost" if lost else "",
            runtime_message="the launcher died; restart the agent" if lost else "",
            network_ready=network.ready,
            network_reason=network.reason,
            network_message=network.message,
        )

    @property
    def busy(self) -> bool:
        """Whether a pod is READY, which is what an ending agent leaves behind."""
        return any(sandbox.ready for sandbox in self.sandboxes.list())


@asynccontextmanager
async def open_node(config: Config) -> AsyncIterator[Node]:
    """The node of this root directory. On leaving, running pods stay; without one, nothing of it stays."""
    root, state = Path(config.root), Path(config.state)
    instance = instance_of(root)
    pods, layers = state / "pods", root / "containers"
    for directory in (root, state, pods, layers):
        files.ensure_directory(directory, mode=0o711)
    async with AsyncExitStack() as stack:
        store, images = await stack.enter_async_context(open_images(config))
        mounts.make_private_mount(pods)
        cgroups = Cgroups.open(driver=config.cgroup.driver, default_parent=f"/nodeagent-{instance}")
        network = await Network.start(config=config.network, store=store, instance=instance)
        own_group = cgroups.instance_group()
        launcher = await Launcher.start(state, join_fds=own_group.join_fds())
        trash = Trash(root / "trash")
        trash.start()
        stack.push_async_callback(trash.close)

        events = Events()
        registry = Registry(store, events)
        supervision = Supervision(registry, launcher, pods)
        stack.push_async_callback(supervision.close)
        planner = Planner(images, cgroups, config, pods)
        containers = Containers(
            registry, supervision, images, cgroups, planner, trash, directory=layers
        )
        slots = Slots(launcher, network, pods, config.slots)
        boot = boot_id()
        sandboxes = Sandboxes(
            registry,
            slots,
            network,
            containers,
            supervision,
            directory=pods,
            cgroup_parent=cgroups.default_parent,
            boot_id=boot,
            handlers=HANDLERS,
        )
        recovery = Recovery(
            registry,
            supervision,
            containers,
            network,
            images,
            launcher,
            trash,
            pods_directory=pods,
            containers_directory=layers,
        )
        await recovery.run(boot)
        slots.start()
        node = Node(
            config=config,
            version=version("nodeagent"),
            sandboxes=sandboxes,
            containers=containers,
            images=images,
            stats=Stats(registry, containers, network, layers),
            events=events,
            slots=slots,
            network=network,
            cgroups=cgroups,
            launcher=launcher,
        )
        try:
            yield node
        finally:
            await sandboxes.close()
            await containers.close()
            await slots.close()
            await _leave(node, pods)


async def _leave(node: Node, pods: Path) -> None:
    """With a pod READY its launcher, supervisors, links and groups stay for the next agent; else none does."""
    busy = node.busy
    await node.network.close(remove=not busy)
    if busy:
        return
    await node.launcher.stop()
    node.cgroups.remove_instance()
    mounts.unmount(pods)
