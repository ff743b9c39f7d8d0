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

    def __init__(self, name: str, elements: Callable[[], Sequence[Any]]) -> None:
        self._name = name
        self._elements = elements

    @classmethod
    def open(cls, declaration: Any, elements: Callable[[], Sequence[Any]]) -> "SimulatedTable":
        table = cls(type(declaration).__name__, elements)
        table.declare()
        return table

    def close(self) -> None:
        """Nothing is open."""

    def declare(self, _declaration: Any = None) -> None:
        world.machine.step("network.declare")
        world.machine.tables[self._name] = set(self._elements())

    def repair(self) -> None:
        """Nobody else changes it."""

    def add(self, elements: Sequence[Any]) -> None:
        world.machine.step("network.add")
        world.machine.tables[self._name].update(elements)

    def remove(self, elements: Sequence[Any]) -> None:
        world.machine.step("network.remove")
        world.machine.tables[self._name].difference_update(elements)

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
