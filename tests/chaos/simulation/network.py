"""The kernel's side of the network: links, tables and the bridge; `nodeagent.net.network` is the real one."""

import errno
from collections.abc import Callable, Iterator, Sequence
from ipaddress import ip_network
from typing import Any

from nodeagent.net.setup import NodeSide
from tests.chaos.simulation import world


class Links:
    """`nodeagent.net.links`."""

    @staticmethod
    def connect(lease: Any, _side: Any, _netns: int, _route: Any, *, is_new: bool) -> None:
        world.machine.step("network.connect", lease.link)
        if lease.link in world.machine.links and is_new:
            raise FileExistsError(errno.EEXIST, "File exists", lease.link)
        world.machine.links[lease.link] = lease.pod_id
        world.machine.addresses[lease.link] = lease.addresses
        world.machine.step("connected")

    @staticmethod
    def plug_in(_names: Any, _side: Any) -> None:
        world.machine.step("network.plug_in")

    @staticmethod
    def delete(name: str) -> None:
        world.machine.step("network.delete", name)
        world.machine.links.pop(name, None)
        world.machine.addresses.pop(name, None)

    @staticmethod
    def exists(name: str) -> bool:
        world.machine.drop_links()
        return name in world.machine.links

    @staticmethod
    def names(_prefix: str) -> Any:
        world.machine.drop_links()
        return _Sorted(world.machine.links)


class _Sorted(set[str]):
    """A set of names that is read in one order."""

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(set.__iter__(self)))

    def difference(self, *others: Any) -> Any:
        return _Sorted(set.difference(self, *others))

    def __and__(self, other: Any) -> Any:
        return _Sorted(set.__and__(self, other))


class SimulatedTable:
    """`nodeagent.net.declared.DeclaredTable`."""

    def __init__(
        self,
        name: str,
        elements: Callable[[], Sequence[Any]],
        explained: Callable[[], Sequence[Any]],
    ) -> None:
        self._name = name
        self._elements = elements
        self._explained = explained
        self._is_settled = False

    @classmethod
    def open(
        cls,
        declaration: Any,
        elements: Callable[[], Sequence[Any]],
        explained: Callable[[], Sequence[Any]] | None = None,
    ) -> "SimulatedTable":
        table = cls(type(declaration).__name__, elements, explained or elements)
        table.declare()
        return table

    def close(self) -> None:
        """Nothing is open."""

    def declare(self, _declaration: Any = None) -> None:
        self._is_settled = False
        world.machine.step("network.declare")
        world.machine.tables[self._name] = set(self._elements())
        self._is_settled = True

    def settle(self) -> None:
        if not self._is_settled:
            self.declare()

    def repair(self) -> None:
        """Nobody else changes it."""
        self.settle()

    def add(self, elements: Sequence[Any]) -> None:
        self._change("network.add", lambda held: held.update(elements))

    def remove(self, elements: Sequence[Any]) -> None:
        self._change("network.remove", lambda held: held.difference_update(elements))

    def _change(self, what: str, change: Callable[[set[Any]], None]) -> None:
        if not self._is_settled:
            self.declare()
            return
        try:
            world.machine.step(what)
        except OSError:
            self.declare()
        else:
            change(world.machine.tables[self._name])

    def strays(self) -> dict[str, Any]:
        world.machine.step("network.strays")
        held = sorted(world.machine.tables.get(self._name, ()), key=str)
        explained = self._explained()
        return {str(element): element for element in held if element not in explained}

    def remove_stray(self, name: str) -> bool:
        stray = self.strays().get(name)
        if stray is not None:
            self.remove([stray])
        return stray is not None

    def delete(self) -> None:
        world.machine.step("network.drop")
        world.machine.tables.pop(self._name, None)


async def set_up(plan: Any) -> NodeSide:
    world.machine.step("network.set_up")
    world.machine.bridge = True
    subnets = tuple(ip_network(cidr) for cidr in (plan.config.subnet4,))
    return NodeSide(bridge="br", index=1, mtu=1500, subnets=subnets, settings={})


async def tear_down(_plan: Any) -> None:
    world.machine.step("network.tear_down")
    world.machine.bridge = False
