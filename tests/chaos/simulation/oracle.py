"""What must hold: after each step of a run, and when it has come to rest."""

from dataclasses import dataclass, field
from typing import Any

from nodeagent.lifecycle.node import Node
from nodeagent.records import Container, HostPort, ImageHold, Lease, Record, Sandbox
from tests.chaos.simulation.machine import Machine
from tests.chaos.simulation.stream import Stream
from tests.chaos.simulation.verdict import Violation

ORDER = {"created": 0, "running": 1, "exited": 2}
UNKNOWN = 255


@dataclass
class Known:
    """What clients were told of an object, and what they have asked for."""

    id: str
    is_stopped: bool = False
    is_removed: bool = False
    is_going: bool = False  # somebody has asked to remove it
    state: str = ""
    code: int | None = None
    boots: int = 0


@dataclass
class Oracle:
    """Keeps what clients know, and compares it with what the agent says."""

    machine: Machine
    sandboxes: dict[str, Known] = field(default_factory=dict)
    containers: dict[str, Known] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)
    pod_of: dict[str, str] = field(default_factory=dict)
    violation: str = ""  # found where nothing can be raised
    stream: Stream | None = None  # of the present life

    async def listen(self, node: Node) -> None:
        """Read the events of a node from now on."""
        async with node.events.subscribe() as events:
            self.stream = Stream(node)
            async for event in events:
                try:
                    self.stream.hear(event)
                except Violation as error:
                    self.violation = str(error)

    def sandbox(self, sandbox_id: str) -> Known:
        return self.sandboxes.setdefault(sandbox_id, Known(sandbox_id, boots=self.machine.boots))

    def container(self, container_id: str) -> Known:
        known = Known(container_id, boots=self.machine.boots)
        return self.containers.setdefault(container_id, known)

    # --- at each step ---

    def look(self, node: Node) -> None:
        """Compare what the agent would list now with all that was said before."""
        if self.machine.wrong:
            raise Violation(self.machine.wrong)
        ready: dict[tuple[Any, ...], str] = {}
        seen: set[str] = set()
        for sandbox in node.sandboxes.list():
            seen.add(sandbox.id)
            self._see_sandbox(sandbox, ready)
        for container in node.containers.list():
            seen.add(container.id)
            self._see_container(container)
        for known in (*self.sandboxes.values(), *self.containers.values()):
            if known.id in self.removed and known.id in seen:
                raise Violation(f"{known.id} was removed, and is listed")
            if known.id not in seen and not self._is_going(known):
                raise Violation(f"{known.id} was acknowledged, and is not listed")

    def _is_going(self, known: Known) -> bool:
        pod = self.sandboxes.get(self.pod_of.get(known.id, ""))
        return known.is_going or (pod is not None and pod.is_going)

    def _see_sandbox(self, sandbox: Sandbox, ready: dict[tuple[Any, ...], str]) -> None:
        known = self.sandboxes.get(sandbox.id)
        is_of_boot = known is not None and known.boots == self.machine.boots
        if is_of_boot and not sandbox.ready and sandbox.id not in self.machine.asked:
            raise Violation(f"sandbox {sandbox.id} is stopped, and nobody has asked for it")
        if sandbox.ready:
            identity = (sandbox.config.uid, sandbox.config.name, sandbox.config.attempt)
            if identity in ready:
                raise Violation(
                    f"two READY sandboxes of {identity}: {ready[identity]}, {sandbox.id}"
                )
            ready[identity] = sandbox.id
            if known is not None and known.is_stopped:
                raise Violation(f"sandbox {sandbox.id} was stopped, and is READY")

    def _see_container(self, container: Container) -> None:
        known = self.container(container.id)
        self.pod_of[container.id] = container.sandbox_id
        if container.id not in self.machine.truths and container.state == "running":
            raise Violation(f"container {container.id} runs, and was never made")
        if known.state and ORDER[container.state] < ORDER[known.state]:
            raise Violation(f"container {container.id} was {known.state}, and is {container.state}")
        if known.is_stopped and container.state == "running":
            raise Violation(f"container {container.id} was stopped, and runs")
        known.state = container.state
        if container.state == "exited":
            self._see_exit(container, known)

    def _see_exit(self, container: Container, known: Known) -> None:
        code = container.exit_code
        # What could not be written, supervisors tell the next agent; a reboot takes that with it.
        is_forgotten = code == UNKNOWN and container.id in self.machine.forgotten
        if known.code is not None and known.code != code and not is_forgotten:
            raise Violation(f"container {container.id} had exit code {known.code}, and has {code}")
        if known.code is None:
            truth = self.machine.truths.get(container.id)
            happened = truth.code if truth else None
            if code not in {UNKNOWN, happened}:
                raise Violation(f"container {container.id} ended with {happened}, and has {code}")
            is_lost = code == UNKNOWN and container.reason == "Unknown"
            if (
                is_lost
                and truth is not None
                and truth.is_known
                and known.boots == self.machine.boots
            ):
                raise Violation(f"container {container.id} ended with {happened}, which is lost")
        known.code = code

    def addresses(self) -> None:
        """No two links have an address in common."""
        taken: dict[str, str] = {}
        self.machine.drop_links()
        for link, addresses in self.machine.addresses.items():
            for address in addresses:
                if taken.setdefault(address, link) != link:
                    raise Violation(f"{address} is on the links {taken[address]} and {link}")

    # --- at rest ---

    def unheard(self, node: Node) -> list[str]:
        """The containers that are RUNNING though they have ended."""
        truths = self.machine.truths
        running = [c.id for c in node.containers.list() if c.state == "running"]
        return [name for name in running if name in truths and truths[name].code is not None]

    def nothing_left(self, node: Node, base: Any) -> None:
        """Only warm slots are left, of all that pods had."""
        slots = {slot.id for slot in node.slots._ready}
        leaks = {kind: count for kind, count in node.reconciliation.leaks.items() if count}
        if leaks:
            raise Violation(f"the reconciliation had to remove leaks: {leaks}")
        found = list(self._left_in_machine(slots)) + list(self._left_in_agent(node, base, slots))
        if found:
            raise Violation(f"left at rest: {'; '.join(found)}")

    def _left_in_machine(self, slots: set[str]) -> Any:
        self.machine.drop_links()
        for pod in self.machine.pods.values():
            if pod.id not in slots:
                yield f"processes of pod {pod.id}"
        for path, group in self.machine.groups.items():
            if not path.endswith("/agent"):
                yield f"cgroup {path} with {len(group.members)}"
        for link, pod_id in self.machine.links.items():
            if pod_id not in slots:
                yield f"link {link} of {pod_id}"

    def _left_in_agent(self, node: Node, base: Any, slots: set[str]) -> Any:
        inventory = node.sandboxes._inventory
        kinds: tuple[type[Record], ...] = (Sandbox, Container, ImageHold, HostPort)
        for kind in kinds:
            yield from (f"row {kind.__name__} {row.key}" for row in base.store.all(kind))
        yield from (f"lease of {row.key}" for row in base.store.all(Lease) if row.key not in slots)
        for directory in (base.places.pods, base.places.containers, base.places.trash):
            yield from (
                f"directory {path}" for path in directory.iterdir() if path.name not in slots
            )
        supervision = node.sessions._supervision
        tables: dict[str, Any] = {
            "locks": inventory._locks,
            "members": inventory._members,
            "pods": inventory.pods,
            "early": supervision._early,
            "ends": supervision._ends,
            "watches": supervision._watches,
            "groups": node.groups._open,
            "starting": node.stopping._starting,
            "pod creations": node.sandboxes._creations._tasks,
            "container creations": node.creation._creations._tasks,
            "container starts": supervision.starts._tasks,
        }
        for name, table in tables.items():
            if table:
                yield f"{name}: {len(table)}"

    def end(self) -> None:
        """An agent that ended without a pod has left nothing at all."""
        machine = self.machine
        machine.drop_links()
        left = {
            "processes": [p.name for p in machine.processes.values() if p.is_alive],
            "links": list(machine.links),
            "cgroups": list(machine.groups),
            "tables": list(machine.tables),
            "bridge": ["br"] if machine.bridge else [],
        }
        found = [f"{name} {what}" for name, what in left.items() if what]
        if found:
            raise Violation(f"left at the end: {'; '.join(found)}")
