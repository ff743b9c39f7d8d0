"""Strays of each kind are found twice, named, removed and counted; what has a record, or is under way, is none."""

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from nodeagent import files
from nodeagent.errors import NodeAgentError, Unavailable
from nodeagent.lifecycle import own_mounts
from nodeagent.lifecycle.events import Events
from nodeagent.lifecycle.inventory import Inventory
from nodeagent.lifecycle.reconcile import KINDS, Reconciliation
from nodeagent.linux import mountinfo
from nodeagent.records import Container
from nodeagent.store import Store
from nodeagent.tasks import Tasks
from tests.unit.cri import records

POD, CONTAINER, STRAY = "a" * 64, "b" * 64, "f" * 64


class World:
    """A node with a pod, and a container in it; `removed` has what is removed."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.inventory = Inventory(store, Events())
        self.inventory.save(records.sandbox(POD))
        self.inventory.save(records.container(CONTAINER, sandbox_id=POD))
        self.pods, self.containers = folder / "pods", folder / "containers"
        self.trash, self.staging = folder / "trash", folder / "staging"
        (self.pods / POD).mkdir(parents=True)
        (self.containers / CONTAINER).mkdir(parents=True)
        (self.pods / "rehearsal").mkdir()
        self.supervised, self.holders, self.leases = {POD}, {CONTAINER}, {POD}
        self.groups = {"/pods/a/b": CONTAINER, "/pods/a/a": POD}
        self.slots, self.under_way, self.recovering = set[str](), set[str](), set[str]()
        self.elements = set[str]()
        # What a supervisor has mounted; nobody asks what others have.
        self.mounts = [self.pods / POD / "shared", self.pods / "rehearsal" / "ns", folder]
        self.errors: dict[str, Exception] = {}  # of listings, by their kind
        self.removed: list[str] = []
        parts: Any = {
            "inventory": self.inventory,
            "launchers": SimpleNamespace(get=self._launcher),
            "slots": SimpleNamespace(ids=self.slots),
            "creation": SimpleNamespace(is_under_way=self.under_way.__contains__),
            "containers": SimpleNamespace(clear_stranger=self._clear, undo=self._undo),
            "network": SimpleNamespace(
                holders=self.leases,
                detach=self._detach,
                strays=self._strays,
                remove_stray=self._remove_element,
            ),
            "images": SimpleNamespace(holders=self.holders, release=self._release),
            "cgroups": SimpleNamespace(
                of_pods_without_parent=self._groups_of_pods, end=self._end_group
            ),
            "places": SimpleNamespace(
                pods=self.pods,
                containers=self.containers,
                trash=self.trash,
                staging=self.staging,
            ),
        }
        self.reconciliation = Reconciliation(**parts, tasks=Tasks())
        self.reconciliation.dismantle = self._dismantle
        self.reconciliation.is_recovering = self.recovering.__contains__

    async def _launcher(self) -> Any:
        async def pods() -> list[str]:
            self._fail("pod")
            return list(self.supervised)

        return SimpleNamespace(pods=pods)

    def _fail(self, kind: str) -> None:
        if kind in self.errors:
            raise self.errors[kind]

    def _groups_of_pods(self) -> dict[str, str]:
        self._fail("cgroup")
        return dict(self.groups)

    async def _strays(self) -> set[str]:
        self._fail("element")
        return set(self.elements)

    async def _remove_element(self, name: str) -> bool:
        self.elements.discard(name)
        self.removed.append(f"element {name[0]}")
        return True

    def table(self) -> str:
        """The node's mounts, as /proc/self/mountinfo has them."""
        self._fail("mount")
        return "".join(f"1 2 0:3 / {point} rw - tmpfs shm rw\n" for point in self.mounts)

    def detach(self, point: str) -> bool:
        """Detach as the kernel does, with all mounts below."""
        is_there = Path(point) in self.mounts
        self.mounts = [each for each in self.mounts if not each.is_relative_to(point)]
        if is_there:
            self.removed.append(f"mount {point[-1]}")
        return is_there

    async def _dismantle(self, directory: Path) -> None:
        self.mounts = [each for each in self.mounts if not each.is_relative_to(directory)]
        self.supervised.discard(directory.name)
        await asyncio.to_thread(files.remove_tree, str(directory))
        self.removed.append(f"pod {directory.name[0]}")

    async def _clear(self, name: str) -> None:
        (self.containers / name).rmdir()
        self.removed.append(f"container {name[0]}")

    async def _undo(self, container: Container) -> None:
        self.inventory.forget(container)
        self.removed.append(f"intention {container.id[0]}")

    async def _detach(self, name: str) -> None:
        self.leases.discard(name)
        self.removed.append(f"lease {name[0]}")

    async def _release(self, name: str) -> None:
        self.holders.discard(name)
        self.removed.append(f"hold {name[0]}")

    def _end_group(self, path: str) -> None:
        del self.groups[path]
        self.removed.append(f"cgroup {path[-1]}")

    def add(self, kind: str) -> None:
        """Leave a thing of this kind that nobody knows of."""
        if kind == "pod":
            (self.pods / STRAY).mkdir()
        elif kind == "supervisor":
            self.supervised.add(STRAY)
        elif kind == "container":
            (self.containers / STRAY).mkdir()
        elif kind == "intention":
            self.inventory.save(records.container(STRAY, sandbox_id=POD, created_at=0))
        elif kind == "orphan":
            self.inventory.save(records.container(STRAY, sandbox_id="e" * 64))
        elif kind == "lease":
            self.leases.add(STRAY)
        elif kind == "cgroup":
            self.groups["/pods/e/f"] = STRAY
        elif kind == "element":
            self.elements.add(STRAY)
        elif kind == "mount":
            self.mounts.append(self.containers / STRAY)
        else:
            self.holders.add(STRAY)


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    with closing(Store.open(tmp_path / "state.db")) as store:
        made = World(store, tmp_path)
        monkeypatch.setattr(mountinfo, "table", made.table)
        monkeypatch.setattr(own_mounts, "detach", made.detach)
        yield made


AS = {"supervisor": "pod", "orphan": "intention"}


@pytest.mark.parametrize("kind", [*KINDS, *AS])
async def test_a_stray_is_removed_when_it_is_seen_again(
    world: World, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    world.add(kind)
    named = AS.get(kind, kind)
    await world.reconciliation.look()
    assert world.removed == []
    await world.reconciliation.look()
    assert world.removed == [f"{named} f"]
    assert world.reconciliation.leaks == {**dict.fromkeys(KINDS, 0), named: 1}
    name = world.containers / STRAY if kind == "mount" else STRAY
    assert caplog.messages == [f'{named} "{name}": no record explains it; removing it']
    for _ in range(2):
        await world.reconciliation.look()
    assert world.removed == [f"{named} f"]


@pytest.mark.parametrize("kind", sorted({*KINDS, *AS} - {"element"}))
async def test_what_is_under_way_is_none(world: World, kind: str) -> None:
    world.add(kind)
    named = AS.get(kind, kind)
    where = {"pod": world.slots, "lease": world.slots, "intention": world.under_way}
    where.get(named, world.recovering).add(STRAY)
    for _ in range(3):
        await world.reconciliation.look()
    assert world.removed == []


async def test_what_is_seen_once_is_left(world: World) -> None:
    """It was just being made, or removed."""
    for _ in range(3):
        world.add("lease")
        await world.reconciliation.look()
        world.leases.discard(STRAY)
        await world.reconciliation.look()
    assert world.removed == []


async def test_what_cannot_be_removed_is_no_leak_yet_and_tried_again(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(_directory: Path) -> None:
        raise Unavailable("not now")

    world.add("pod")
    dismantle, world.reconciliation.dismantle = world.reconciliation.dismantle, fail
    for _ in range(2):
        await world.reconciliation.look()
    assert f'pod "{STRAY}": cannot be removed yet: not now' in caplog.messages
    assert not world.reconciliation.leaks.total()
    world.reconciliation.dismantle = dismantle
    await world.reconciliation.look()
    assert world.reconciliation.leaks["pod"] == 1


LISTED = {"pod": "supervisor", "cgroup": "cgroup", "element": "element", "mount": "mount"}
FAILURES = (
    Unavailable("launcher: died"),
    OSError(errno.EMFILE, "Too many open files"),
    TimeoutError(),
)


@pytest.mark.parametrize("kind", LISTED)
async def test_a_listing_that_fails_hides_nothing_else(
    world: World, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    world.errors[kind] = Unavailable("not now")
    world.add("container")
    for _ in range(2):
        await world.reconciliation.look()
    assert world.removed == ["container f"]
    assert f"{kind}s: cannot all be listed, a stray may be missed: not now" in caplog.messages


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("kind", LISTED)
async def test_a_listing_that_fails_is_not_an_empty_one(
    world: World, kind: str, error: NodeAgentError | OSError
) -> None:
    """What it has found before stays suspect, and is not removed before it is seen again."""
    world.add(LISTED[kind])
    await world.reconciliation.look()
    world.errors[kind] = error
    for _ in range(3):
        await world.reconciliation.look()
    assert world.removed == []
    world.errors.clear()
    await world.reconciliation.look()
    assert world.removed == [f"{kind} f"]


@pytest.mark.parametrize("where", ["pods", "containers"])
async def test_a_directory_that_cannot_be_listed_hides_nothing_else(
    world: World, where: str
) -> None:
    getattr(world, where).rename(world.pods.parent / "aside")
    world.add("element")
    for _ in range(2):
        await world.reconciliation.look()
    assert world.removed == ["element f"]


async def test_mounts_on_directories_of_the_agent_are_the_operators(world: World) -> None:
    """He may give each of them a file system of its own, and have others elsewhere."""
    folder = world.pods.parent
    world.mounts += [
        world.pods, world.containers, world.trash, world.staging, folder / "layers" / STRAY,
        folder.with_name(f"{folder.name}-of-another") / "containers" / STRAY,
        world.containers / "lost+found",
    ]  # fmt: skip
    for _ in range(2):
        await world.reconciliation.look()
    assert world.removed == []


@pytest.mark.parametrize("where", ["trash", "staging"])
async def test_mounts_in_what_is_on_its_way_out_are_strays(world: World, where: str) -> None:
    world.mounts.append(getattr(world, where) / "layer-1" / "a")
    for _ in range(2):
        await world.reconciliation.look()
    assert world.removed == ["mount a"]
    assert world.reconciliation.leaks["mount"] == 1


async def test_the_mounts_of_a_stray_pod_go_with_it(world: World) -> None:
    world.add("pod")
    world.mounts += [world.pods / STRAY / "shared", world.pods / STRAY / "ns" / "net"]
    for _ in range(3):
        await world.reconciliation.look()
    assert world.removed == ["pod f"]
    assert world.reconciliation.leaks.total() == 1


async def test_a_stopped_pod_has_no_mounts(world: World) -> None:
    world.inventory.save(msgspec.structs.replace(world.inventory.sandboxes[POD], stopped_at=9))
    world.leases.clear()
    for _ in range(2):
        await world.reconciliation.look()
    assert world.removed == ["mount d"]


async def test_a_stopped_pod_and_its_containers_are_records(world: World) -> None:
    stopped = msgspec.structs.replace(world.inventory.sandboxes[POD], stopped_at=9)
    world.inventory.save(stopped)
    world.leases.clear()
    world.mounts.clear()
    for _ in range(2):
        await world.reconciliation.look()
    assert world.removed == []


async def test_a_stopped_pod_has_no_network(world: World) -> None:
    """Its stop gives that back last, and may have failed; a kubelet does not stop a pod again that is NOTREADY."""
    stopped = msgspec.structs.replace(world.inventory.sandboxes[POD], stopped_at=9)
    world.inventory.save(stopped)
    world.mounts.clear()
    for _ in range(3):
        await world.reconciliation.look()
    assert world.removed == ["lease a"]


async def test_an_agent_that_ends_leaves_no_group_that_only_it_would_find(world: World) -> None:
    world.add("cgroup")
    await world.reconciliation.end_groups()
    assert world.removed == ["cgroup f"]
    assert world.groups == {"/pods/a/b": CONTAINER, "/pods/a/a": POD}
