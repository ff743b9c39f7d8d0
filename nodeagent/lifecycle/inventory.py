"""The pods and containers of this node, in memory; each change is written before it is visible.

Lists and statuses are answered from here, never from a kernel file or a process.
"""

import asyncio
import functools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from nodeagent.database import REMEDY
from nodeagent.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NodeAgentError,
    NotFound,
)
from nodeagent.lifecycle.events import Events, Kind
from nodeagent.records import Container, Record, Sandbox
from nodeagent.sandbox.agent.client import Supervisor
from nodeagent.store import Store

log = logging.getLogger(__name__)


class Pod:
    """The state of a sandbox while the agent runs, besides its record.

    supervisor is None once the pod is stopped. `closing` refuses new containers; `creating` are the creations under
    way, which a stop cancels: none of them may hold a lock, because they can hang on a network file system.
    """

    def __init__(self, supervisor: Supervisor | None = None) -> None:
        self.supervisor = supervisor
        self.lock = asyncio.Lock()
        self.closing = supervisor is None
        self.creating: set[asyncio.Task[object]] = set()

    @contextmanager
    def creation(self, sandbox_id: str) -> Iterator[Supervisor]:
        """The supervisor for a creation that a stop of the pod may cancel."""
        task = asyncio.current_task()
        if self.closing or self.supervisor is None or task is None:
            raise FailedPrecondition(f'pod sandbox "{sandbox_id}": is stopped')
        self.supervisor.require()  # before anything is made that would have to be undone
        self.creating.add(task)
        try:
            yield self.supervisor
        finally:
            self.creating.discard(task)


class Inventory:
    """Records by id, with their durable copy and their events."""

    def __init__(self, store: Store, events: Events) -> None:
        self.store = store
        self.events = events
        self.sandboxes: dict[str, Sandbox] = {record.id: record for record in store.all(Sandbox)}
        self.containers: dict[str, Container] = {c.id: c for c in store.all(Container)}
        self.pods: dict[str, Pod] = {}
        self._members: dict[str, dict[str, None]] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._unwritten: set[str] = set()  # containers of which something was noted only
        for container in self.containers.values():
            self._members.setdefault(container.sandbox_id, {})[container.id] = None

    @property
    def unreadable(self) -> frozenset[str]:
        """The ids of pods and containers whose records cannot be read: what runs under them is left as it is."""
        return self.store.unreadable(Sandbox) | self.store.unreadable(Container)

    # --- reading ---

    def visible_sandboxes(self) -> list[Sandbox]:
        """Every pod that is or was READY."""
        return [record for record in self.sandboxes.values() if record.ready_at]

    def visible_containers(self) -> list[Container]:
        """Every container whose creation has finished."""
        return [record for record in self.containers.values() if record.created_at]

    def supervisor(self, container: Container) -> Supervisor:
        """The supervisor of a container's pod. Raises FailedPrecondition when the pod is stopped."""
        pod = self.pods.get(container.sandbox_id)
        if pod is None or pod.supervisor is None:
            raise FailedPrecondition(f'container "{container.id}": its pod is stopped')
        return pod.supervisor

    def members(self, sandbox_id: str) -> list[Container]:
        """The finished and unfinished containers of a pod, oldest first."""
        return [self.containers[key] for key in self._members.get(sandbox_id, ())]

    def sandbox(self, name: str) -> Sandbox:
        """The pod with this id or unique prefix of one. Raises NotFound."""
        self._refuse_unreadable("pod sandbox", name)
        record = self.sandboxes[_resolve("pod sandbox", name, self.sandboxes)]
        if not record.ready_at:
            raise NotFound(f'pod sandbox "{name}": not found')
        return record

    def container(self, name: str) -> Container:
        """The container with this id or unique prefix of one. Raises NotFound."""
        self._refuse_unreadable("container", name)
        record = self.containers[_resolve("container", name, self.containers)]
        if not record.created_at:
            raise NotFound(f'container "{name}": not found')
        return record

    def _refuse_unreadable(self, what: str, name: str) -> None:
        """Raise DataLoss: "not found" would tell whoever removes it that it is gone."""
        if name in self.unreadable:
            raise DataLoss(f'{what} "{name}": its record cannot be read; {REMEDY}')

    def lock(self, container_id: str) -> asyncio.Lock:
        """The lock that serialises start, update and removal of one container."""
        return self._locks.setdefault(container_id, asyncio.Lock())

    # --- writing ---

    def save(self, record: Sandbox | Container, *events: Kind) -> None:
        """Write the record, publish it, then send events; nothing is changed anywhere when the write fails."""
        self.store.put(record)
        self._publish(record, events)

    def note(self, record: Sandbox | Container, event: Kind) -> None:
        """Like save, for events that have already happened: publish even if the write fails.

        The next agent learns of them from supervisors.
        """
        try:
            self.store.put(record)
            self._unwritten.discard(record.id)
        except (NodeAgentError, OSError) as error:
            log.error('"%s" is %s, but its record cannot be written: %s', record.id, event, error)
            self._unwritten.add(record.id)
        self._publish(record, (event,))

    def write_noted(self, containers: Iterable[Container]) -> None:
        """Write what was only noted of containers of which their supervisor will not tell it again."""
        for container_id in self._unwritten.intersection(c.id for c in containers):
            self.store.put(self.containers[container_id])
            self._unwritten.discard(container_id)

    def _publish(self, record: Sandbox | Container, events: Sequence[Kind]) -> None:
        if isinstance(record, Sandbox):
            self.sandboxes[record.id] = record
        else:
            self.containers[record.id] = record
            self._members.setdefault(record.sandbox_id, {})[record.id] = None
        for event in events:
            self._tell(event, record)

    def forget(self, record: Sandbox | Container) -> None:
        """Remove the record for good; one that is gone already stays gone."""
        self.store.delete(type(record), record.id)
        is_first = record.id in self.sandboxes or record.id in self.containers
        if isinstance(record, Sandbox):
            self.sandboxes.pop(record.id, None)
            self.pods.pop(record.id, None)
            self._members.pop(record.id, None)
        else:
            self.containers.pop(record.id, None)
            self._members.get(record.sandbox_id, {}).pop(record.id, None)
            self._locks.pop(record.id, None)
            self._unwritten.discard(record.id)
        if is_first and not _is_intention(record):
            self._tell("deleted", record)

    def _tell(self, kind: Kind, record: Record) -> None:
        sandbox_id = record.sandbox_id if isinstance(record, Container) else record.key
        members = tuple(c for c in self.members(sandbox_id) if c.created_at)
        self.events.publish(kind, record.key, self.sandboxes.get(sandbox_id), members)


def _is_intention(record: Sandbox | Container) -> bool:
    return not (record.ready_at if isinstance(record, Sandbox) else record.created_at)


@functools.cache
def boot_id() -> str:
    """The kernel's name for this boot: records of another one describe processes that cannot exist."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _resolve(what: str, name: str, known: Mapping[str, object]) -> str:
    if name in known:
        return name
    found = _with_prefix(name, known) if name else []
    if len(found) > 1:
        raise InvalidArgument(f'{what} "{name}": {len(found)} ids begin like this')
    if not found:
        raise NotFound(f'{what} "{name}": not found')
    return found[0]


def _with_prefix(prefix: str, known: Iterable[str]) -> list[str]:
    return [key for key in known if key.startswith(prefix)]
