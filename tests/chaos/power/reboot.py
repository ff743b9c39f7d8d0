"""What an agent makes of a root directory after a power loss: its own parts, without a supervisor or a kernel object.

The machine has been rebooted: nothing runs, the state directory is empty, and the boot is another one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from nodeagent.errors import SecurityProfileInvalid
from nodeagent.images import verification
from nodeagent.images.catalog import Images
from nodeagent.images.image_store import documents
from nodeagent.images.profiles import SecurityProfiles
from nodeagent.images.remote.client import open_session
from nodeagent.lifecycle import recovery
from nodeagent.lifecycle.containers.containers import Containers
from nodeagent.lifecycle.containers.directories import Directories
from nodeagent.lifecycle.containers.removal import Removal
from nodeagent.lifecycle.events import Events
from nodeagent.lifecycle.inventory import Inventory
from nodeagent.lifecycle.recovery import Recovery
from nodeagent.lifecycle.supervisors.supervision import Supervision
from nodeagent.records import KINDS, Image, Layer
from nodeagent.store import Store
from nodeagent.tasks import Tasks
from nodeagent.trash import Trash
from tests.chaos.power import trees
from tests.chaos.power.trees import Tree

BOOT = "the boot after the power loss"


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What was promised before the power loss.

    present: names of images whose pull or load was answered, and that nobody has begun to remove; absent: images that
    nobody has begun to pull. layers: what each of them has, by chain ID.
    """

    present: frozenset[str]
    absent: frozenset[str]
    layers: Mapping[str, Tree]


@asynccontextmanager
async def rebooted(root: Path, state: Path, certs: Path) -> AsyncIterator[tuple[Store, Images]]:
    """Recover a root directory as an agent does. Raises what its start would fail with."""
    pods, containers = state / "pods", root / "containers"
    for directory in (pods, containers):
        directory.mkdir(parents=True, exist_ok=True)
    store = Store.open(root / "state.db")
    try:
        async with Tasks() as tasks, open_session() as session:
            images = await Images.open(
                root=root, store=store, hosts_dir=certs, session=session, tasks=tasks
            )
            profiles = await SecurityProfiles.open(
                root=root, store=store, hosts_dir=certs, session=session, tasks=tasks, check=_check
            )
            trash = Trash(root / "trash", "trash", tasks)
            try:
                with mock.patch.object(recovery, "boot_id", return_value=BOOT):
                    await _recovery(store, images, trash, tasks, pods, containers).run()
                await trash.emptied()
                await images._staging.emptied()
                yield store, images
            finally:
                await trash.close()
                await profiles.close()
                await images.close()
    finally:
        store.close()


async def _check(_: bytes) -> None:
    raise SecurityProfileInvalid("none is pulled here")


def _recovery(
    store: Store, images: Images, trash: Trash, tasks: Tasks, pods: Path, containers: Path
) -> Recovery:
    async def nothing(*_: object) -> None:
        """Nothing runs."""

    async def no_pods() -> list[str]:
        return []

    async def launcher() -> Any:
        return SimpleNamespace(pods=no_pods)

    launchers: Any = SimpleNamespace(get=launcher)
    groups: Any = SimpleNamespace(remove=nothing, remove_at=nothing)
    nobody: Any = SimpleNamespace(
        kill_all=nothing, recover=nothing, container_path=lambda *_: "", end=lambda _: None
    )
    places: Any = SimpleNamespace(pods=pods, containers=containers)
    inventory = Inventory(store, Events())
    directories = Directories(containers, trash)
    supervision = Supervision(inventory, launchers, pods, tasks)
    return Recovery(
        inventory=inventory,
        supervision=supervision,
        containers=Containers(
            inventory=inventory,
            supervision=supervision,
            groups=groups,
            stopping=nobody,
            removal=Removal(inventory, groups, images, directories, tasks),
            directories=directories,
            pods=pods,
        ),
        stopping=nobody,
        network=nobody,
        images=images,
        launchers=launchers,
        cgroups=nobody,
        places=places,
    )


async def faults(root: Path, state: Path, certs: Path, expected: Expected) -> list[str]:
    """What is wrong with a root directory after the recovery, in words.

    Where an image turns out to be incomplete, its other layers and its documents are kept for the pull that follows:
    what is left without an owner goes with the next start.
    """
    try:
        async with rebooted(root, state, certs) as (store, images):
            found = _of_images(root, images, expected)
            if found or not _of_files(root, store):
                return found
        async with rebooted(root, state, certs) as (store, images):
            return [*_of_images(root, images, expected), *_of_files(root, store)]
    except Exception as error:  # noqa: BLE001 whatever it is, the agent would not start
        return [f"the agent does not start: {type(error).__name__}: {error}"]


def _of_images(root: Path, images: Images, expected: Expected) -> list[str]:
    found = []
    listed = {name for image in images.list() for name in image.repo_tags}
    found += [f"{name}: was promised, and is not there" for name in expected.present - listed]
    found += [f"{name}: is there, and nobody has asked for it" for name in expected.absent & listed]
    for image in images.list():
        for chain in image.layers:
            path = root / "layers" / chain.removeprefix("sha256:")
            if not path.is_dir():
                found.append(f"{image.repo_tags}: layer {chain} is missing")
            elif trees.tree_of(path) != expected.layers[chain]:
                found.append(f"{image.repo_tags}: layer {chain} is not what was unpacked")
        if expected.present.intersection(image.repo_tags):
            found += [
                f"{image.repo_tags}: document {digest} is missing"
                for digest in documents(image)
                if not (root / "blobs/sha256" / digest.removeprefix("sha256:")).exists()
            ]
    return found


def _of_files(root: Path, store: Store) -> list[str]:
    found = [
        f"{kind.__name__} {key}: unreadable" for kind in KINDS for key in store.unreadable(kind)
    ]
    layers = {layer.chain_id.removeprefix("sha256:") for layer in store.all(Layer)}
    kept = {path.name for path in (root / "layers").iterdir()}
    found += [f"layer {name}: recorded, and has no directory" for name in layers - kept]
    found += [f"layer {name}: has no record" for name in kept - layers]
    owners = store.all(Image)
    known = {digest.removeprefix("sha256:") for image in owners for digest in documents(image)}
    found += [
        f"document {path.name}: belongs to no image"
        for path in (root / "blobs/sha256").iterdir()
        if path.name not in known
    ]
    found += [str(damaged) for _, damaged in verification.documents(root) if damaged is not None]
    for name in ("staging", "trash"):
        found += [f"{path}: is left" for path in (root / name).iterdir()]
    containers = {key for key, _ in store._rows.rows("record_container")}
    found += [
        f"{path}: has no record"
        for path in (root / "containers").iterdir()
        if path.name not in containers
    ]
    return found
