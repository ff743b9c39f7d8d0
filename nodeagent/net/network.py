"""The pods' network: what the rest of the agent uses of this package.

Each pod has a veth pair on the agent's bridge, addresses by leases in the store, and its host ports in a nf_tables
table of the agent; another table drops what it sends from addresses that it was not given. Kernel calls that may wait
for the routing lock (RTNL), which others hold for tens of milliseconds while they delete links, are made in threads.

::

    attach                                              detach                          the link is gone
    ──────► lease held, may send, link, eth0 configured ───────► lease released, no port ────────────────► forgotten
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_interface
from typing import Self

import msgspec

from nodeagent.config import Network as NetworkConfig
from nodeagent.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unsupported,
)
from nodeagent.net import (
    bridge,
    conntrack,
    links,
    listeners,
    nftables,
    setup,
    spoofing,
    stats,
    sysctls,
)
from nodeagent.net.addresses import Subnet, gateway, parse_pod_cidr
from nodeagent.net.declared import DeclaredTable
from nodeagent.net.hostports import HostPorts
from nodeagent.net.ipam import Ipam, interfaces
from nodeagent.net.nftables import NFPROTO_BRIDGE, Element, Table
from nodeagent.net.ruleset import Ruleset, elements
from nodeagent.net.spoofing import SpoofFilter
from nodeagent.net.stats import InterfaceStats
from nodeagent.records import HostPort, Lease, NodeNetwork
from nodeagent.requests import PortMapping
from nodeagent.store import Store
from nodeagent.tasks import Tasks, to_the_end

__all__ = ["InterfaceStats", "Network", "NetworkConfig", "NetworkStatus", "PortMapping"]

log = logging.getLogger(__name__)

# A pod's link goes with its namespace, a few tens of milliseconds after its last process; one that stays longer is
# deleted by name.
_REAP_SECONDS = 0.1
_PATIENCE_NS = 1_000_000_000
_RETRY_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkStatus:
    """The state of the network. reason and message are empty where it is ready; problems may be there in any case."""

    ready: bool
    reason: str = ""
    message: str = ""
    problems: tuple[str, ...] = ()


class Network:
    """The pods' network of one agent. Leases and host ports are in the store, all else is in the kernel."""

    def __init__(self, config: NetworkConfig, store: Store, instance: str, tasks: Tasks) -> None:
        self._config = config
        self._store = store
        self._instance = instance
        self._link_prefix = f"nv{instance}"
        self._ipam = Ipam(store, self._link_prefix, ())
        self._host_ports = HostPorts(store)
        self._choices: NodeNetwork
        self._side: setup.NodeSide
        self._said = (
            ""  # what was last logged about the subnet of pods; logged again when it changes
        )
        self._nat: DeclaredTable | None = None
        self._nat_missing = ""
        self._filter: DeclaredTable | None = None
        self._filter_missing = ""
        self._workers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="net")
        self._setting_up = asyncio.Lock()
        self._forgetting = asyncio.Lock()
        self._bridge_lost = asyncio.Event()
        self._released = asyncio.Event()
        self._tasks = tasks.part()

    @classmethod
    async def start(
        cls, *, config: NetworkConfig, store: Store, instance: str, tasks: Tasks
    ) -> Self:
        """Set the node's side up, or take over what an earlier agent left.

        instance: eight hexadecimal digits, from which all names in the kernel derive.
        """
        if not config.subnet4 and not config.subnet6:
            raise InvalidArgument("network: subnet4 and subnet6 are both empty")
        network = cls(config, store, instance, tasks)
        await network._set_up(store.get(NodeNetwork, "node") or NodeNetwork())
        network._open_tables()
        keep = partial(network._tasks.keep, longest_pause_seconds=_RETRY_SECONDS)
        keep("network leases", network._reap)
        keep("network bridge", network._mend)
        return network

    @classmethod
    async def overlaps(cls, *, config: NetworkConfig, store: Store, instance: str) -> list[str]:
        """What `start` would find amiss with the subnets of pods; nothing is made."""
        network = cls(config, store, instance, Tasks())
        choices = store.get(NodeNetwork, "node") or NodeNetwork()
        return await setup.overlapping(network._plan(choices))

    async def close(self, *, remove: bool) -> None:
        """Stop. With `remove` delete all that the kernel has of this network; else it stays for the next agent.

        Everything that can be is deleted and closed; then the first error is raised.
        """
        async with AsyncExitStack() as stack:
            for table in self._tables():
                stack.callback(table.close)
            stack.callback(self._workers.shutdown)
            if remove:
                self._push_removal(stack)
            await self._tasks.close()

    # --- pods ---

    async def attach(self, pod_id: str, netns_fd: int, route_socket: socket.socket) -> Lease:
        """Connect a pod: link, addresses, routes, loopback. On success all of it works; on failure it is undone.

        route_socket: NETLINK_ROUTE, opened inside the namespace of `netns_fd`. For a pod that is attached already its
        lease is returned. Raises `ResourceExhausted` where no address is free, and `OSError`.
        """
        lease = self._ipam.leases.get(pod_id)
        if lease is not None and lease.released_at:
            await self._run(partial(links.delete, lease.link))
            await self._forget([lease])
            lease = None
        is_new = lease is None
        lease = lease or self._ipam.acquire(pod_id)
        try:
            await self._run(partial(self._connect, lease, netns_fd, route_socket, is_new=is_new))
        except BaseException:
            if is_new:
                self._release(pod_id)
            raise
        return lease

    def _connect(
        self, lease: Lease, netns_fd: int, route_socket: socket.socket, *, is_new: bool
    ) -> None:
        # The filter first: from the moment that the link is up it drops what it does not know.
        if self._filter is not None:
            self._filter.add(list(spoofing.elements(lease)))
        links.connect(lease, self._side, netns_fd, route_socket, is_new=is_new)

    async def publish(self, pod_id: str, mappings: Sequence[PortMapping]) -> None:
        """Forward ports of the node to a pod, in place of those that it had. Mappings with host_port 0 are ignored.

        Raises `AlreadyExists` for a port that another pod has, and `Unsupported` where the kernel cannot do it.
        """
        wanted = [mapping for mapping in mappings if mapping.host_port]
        if not wanted:
            return
        lease = self._ipam.leases.get(pod_id)
        if lease is None or lease.released_at:
            raise NotFound(f'pod "{pod_id}": has no network')
        nat = self._host_port_nat()
        versions = [interface.version for interface in interfaces(lease)]
        before = self._elements(self._host_ports.of(pod_id))
        ports = self._host_ports.reserve(pod_id, wanted, versions)
        try:
            after = self._elements(ports)
            nat.remove([element for element in before if element not in after])
            nat.add(after)
        except BaseException:
            self._host_ports.release(pod_id)
            raise
        self._run_behind(partial(_warn_of_listeners, ports, versions))
        # After the ports are forwarded: a flow that a sender begins before that would keep its lack of a translation.
        if udp := [port.host_port for port in ports if port.protocol == "udp"]:
            self._run_behind(partial(conntrack.forget_unanswered, udp, versions))

    @property
    def holders(self) -> set[str]:
        """The pods that have addresses or host ports."""
        leased = {lease.pod_id for lease in self._ipam.leases.values() if not lease.released_at}
        return leased | {port.pod_id for port in self._host_ports.all()}

    async def detach(self, pod_id: str) -> None:
        """Take a pod's ports and addresses back. Succeeds for an unknown pod.

        Its link may stay until its namespace is gone; the addresses are not leased again before that.
        """
        try:
            self._withdraw(pod_id)
        finally:
            self._release(pod_id)

    async def recover(self, pods: Collection[str]) -> None:
        """Release everything of pods that are not among `pods`, and declare the tables as the store has them."""
        for pod_id in {port.pod_id for port in self._host_ports.all()}.difference(pods):
            self._withdraw(pod_id)
        for pod_id in (self._ipam.leases.keys() | self._ipam.unreadable) - set(pods):
            self._release(pod_id)
        for table in self._tables():
            table.declare()
        present = await self._plug_in()
        if self._ipam.unreadable:
            return  # one of the links is of a pod whose lease cannot be read
        for stray in present.difference(lease.link for lease in self._ipam.leases.values()):
            await self._run(partial(links.delete, stray))

    async def strays(self) -> set[str]:
        """The elements of the agent's tables that no lease and no host port explains, as nft(8) writes them.

        Raises `OSError` where the kernel does not list them.
        """
        return set[str]().union(*[await to_the_end(None, table.strays) for table in self._tables()])

    async def remove_stray(self, name: str) -> bool:
        """Remove an element that `strays` has found; False where it is gone, or explained by now."""
        found = [
            await to_the_end(None, partial(table.remove_stray, name)) for table in self._tables()
        ]
        return any(found)

    async def set_pod_cidr(self, cidr: str) -> None:
        """Give new pods addresses of these subnets, from now on and after a restart; pods keep the ones they have.

        cidr: as in UpdateRuntimeConfig, "10.1.0.0/24" or "10.1.0.0/24,fd00:1::/64"; empty changes nothing. A family
        that is not configured is ignored. Raises `InvalidArgument`, and `FailedPrecondition` where a pod has the
        address of a gateway.
        """
        if not cidr:
            return
        subnets = parse_pod_cidr(cidr)
        async with self._setting_up:
            await self._use_pod_cidr(cidr, subnets)

    async def _use_pod_cidr(self, cidr: str, subnets: Sequence[Subnet]) -> None:
        pod_cidrs = tuple(map(str, subnets))
        if pod_cidrs == self._choices.pod_cidrs:
            return
        for address in (gateway(subnet).ip for subnet in subnets):
            if pod_id := self._ipam.holder(address):
                raise FailedPrecondition(
                    f'pod_cidr "{cidr}": pod "{pod_id}" has {address}, which would be the gateway\'s'
                )
        await self._set_up(msgspec.structs.replace(self._choices, pod_cidrs=pod_cidrs))
        if self._nat is not None:
            self._nat.declare(self._ruleset())

    def hands_out(self, addresses: Sequence[str]) -> bool:
        """Whether these addresses of a lease are of the subnets that new pods get theirs from."""
        return tuple(ip_interface(address).network for address in addresses) == self._side.subnets

    # --- state ---

    def status(self) -> NetworkStatus:
        """The present state. Tables and settings that others have changed are repaired at once, the bridge later."""
        problems = self._problems()
        if not bridge.is_up(self._side.bridge) and not self._bridge_lost.is_set():
            log.warning("bridge %s: missing or down; making it again", self._side.bridge)
            self._bridge_lost.set()
        if self._bridge_lost.is_set():
            return NetworkStatus(
                ready=False,
                reason="BridgeDown",
                message=f'bridge "{self._side.bridge}": is missing or down',
                problems=tuple(problems),
            )
        try:
            self._repair()
        except OSError as error:
            problems.append(str(error))
        return NetworkStatus(ready=True, problems=tuple(problems))

    def all_interface_stats(self) -> dict[str, InterfaceStats]:
        """The traffic of each attached pod, by pod id."""
        by_link = stats.read_all(self._link_prefix)
        return {
            lease.pod_id: by_link[lease.link]
            for lease in self._ipam.leases.values()
            if lease.link in by_link
        }

    def _problems(self) -> list[str]:
        return [*self._side.problems, *self._missing()]

    def _missing(self) -> Iterator[str]:
        """What is configured and this kernel lacks."""
        wanted = {"host ports": self._config.host_ports, "masquerade": self._config.masquerade}
        if self._nat_missing:
            yield from (f"no {what}: {self._nat_missing}" for what in wanted if wanted[what])
        if self._filter_missing:
            yield f"no protection against spoofing by pods: {self._filter_missing}"

    def _repair(self) -> None:
        for table in self._tables():
            table.repair()
        for name in sysctls.differing(self._settings()):
            log.warning("sysctl %s: changed by another program; setting it again", name)
        sysctls.apply(self._settings())

    # --- the node's side ---

    async def _set_up(self, choices: NodeNetwork) -> None:
        side = await setup.set_up(self._plan(choices))
        if side.moved and side.moved != self._said:
            log.info("%s", side.moved)
        self._side, self._said = side, side.moved
        self._ipam.use(self._side.subnets)
        self._choices = setup.with_choice(choices, self._config.subnet4, self._side.subnets)
        self._store.put(self._choices)

    async def _mend(self) -> None:
        """Make the bridge again where another program has deleted it or set it down."""
        while True:
            await self._bridge_lost.wait()
            async with self._setting_up:
                await self._set_up(self._choices)
            sysctls.apply(self._settings())
            await self._plug_in()
            self._bridge_lost.clear()

    async def _plug_in(self) -> set[str]:
        """Make the links of pods ports of the bridge. Returns the names of all links that exist."""
        present = links.names(self._link_prefix)
        held = {lease.link for lease in self._ipam.leases.values() if not lease.released_at}
        await self._run(partial(links.plug_in, present & held, self._side))
        return present

    def _plan(self, choices: NodeNetwork) -> setup.Plan:
        return setup.Plan(
            config=self._config,
            instance=self._instance,
            choices=choices,
            held=self._ipam.subnets,
        )

    def _open_tables(self) -> None:
        if not self._config.host_ports:
            # route_localnet off, before the table of an earlier agent is replaced by one without the guard.
            sysctls.apply(self._settings())
        try:
            self._nat = DeclaredTable.open(
                self._ruleset(), lambda: self._elements(self._host_ports.all())
            )
        except Unsupported as error:
            self._nat_missing = str(error)
        # route_localnet on only now: without the table's guard pods would reach the node's loopback (CVE-2020-8558).
        sysctls.apply(self._settings())
        self._open_filter()
        for problem in self._missing():
            log.warning("%s", problem)

    def _open_filter(self) -> None:
        table = Table(f"nodeagent_{self._instance}", NFPROTO_BRIDGE)
        if not self._config.spoof_protection:
            nftables.discard(table)  # of an earlier agent, whose configuration had it on
            return
        declaration = SpoofFilter(table=table, link_prefix=self._link_prefix)
        try:
            self._filter = DeclaredTable.open(declaration, self._senders, self._known_senders)
        except Unsupported as error:
            self._filter_missing = str(error)

    def _senders(self) -> list[Element]:
        """The elements of the filter for all pods. Also called by threads."""
        # A copy made in one step: the loop may add or remove leases meanwhile.
        held = [lease for lease in list(self._ipam.leases.values()) if not lease.released_at]
        return [element for lease in held for element in spoofing.elements(lease)]

    def _known_senders(self) -> list[Element]:
        """Like `_senders`, with those of released leases, whose elements go when their links have gone."""
        leases = list(self._ipam.leases.values())
        return [element for lease in leases for element in spoofing.elements(lease)]

    def _tables(self) -> list[DeclaredTable]:
        return [table for table in (self._nat, self._filter) if table is not None]

    def _settings(self) -> dict[str, str]:
        is_guarded = self._nat is not None and self._config.host_ports
        return self._side.settings | sysctls.loopback(self._side.bridge, routed=is_guarded)

    def _ruleset(self) -> Ruleset:
        return Ruleset(
            table=Table(f"nodeagent_{self._instance}"),
            bridge=self._side.bridge,
            subnets=self._ipam.subnets,
            masquerade=self._config.masquerade,
            host_ports=self._config.host_ports,
        )

    def _push_removal(self, stack: AsyncExitStack) -> None:
        """Have the stack remove everything, the last step that is pushed first; none depends on the success of another.

        The records go last, and with a store that fails the next agent frees what belongs to no pod.
        """
        stack.callback(self._forget_all)
        stack.push_async_callback(setup.tear_down, self._plan(self._choices))
        # Links before the bridge: without it they would be links of the node, which hears what pods send.
        stack.push_async_callback(self._delete_links)
        for table in self._tables():
            stack.callback(table.delete)

    async def _delete_links(self) -> None:
        async with AsyncExitStack() as stack:
            for name in links.names(self._link_prefix):
                stack.push_async_callback(self._run, partial(links.delete, name))

    def _forget_all(self) -> None:
        for lease in list(self._ipam.leases.values()):
            self._ipam.forget(lease)

    # --- host ports ---

    def _host_port_nat(self) -> DeclaredTable:
        if not self._config.host_ports:
            raise FailedPrecondition(
                "host ports: this node forwards none, network.host_ports of its configuration is off"
            )
        if self._nat is None:
            raise Unsupported(f"host ports: {self._nat_missing}")
        return self._nat

    def _withdraw(self, pod_id: str) -> None:
        ports = self._host_ports.of(pod_id)
        if not ports:
            if self._nat is not None:
                self._nat.settle()  # an earlier attempt may have got as far as the record
            return
        gone = self._elements(ports)
        # The record goes first: where the removal fails, the table is declared again from the records.
        try:
            self._host_ports.release(pod_id)
        finally:
            # Even if the record stays: the next attempt may come when the lease, which names the elements, has gone.
            if self._nat is not None and self._config.host_ports:
                self._nat.remove(gone)
        if any(port.protocol == "udp" for port in ports):
            lease = self._ipam.leases.get(pod_id)
            addresses = [interface.ip for interface in interfaces(lease)] if lease else []
            self._run_behind(partial(conntrack.forget_flows_to, addresses))

    def _elements(self, ports: Sequence[HostPort]) -> list[Element]:
        """The elements that forward the ports. Also called by threads, while the loop may remove leases."""
        leased = ((port, self._ipam.leases.get(port.pod_id)) for port in ports)
        return [
            element
            for port, lease in leased
            if lease is not None
            for element in elements(port, [i.ip for i in interfaces(lease)])
        ]

    # --- leases whose pod is gone ---

    def _release(self, pod_id: str) -> None:
        try:
            self._ipam.release(pod_id)
        finally:
            self._released.set()

    async def _reap(self) -> None:
        while True:
            while released := self._ipam.released():
                await asyncio.sleep(_REAP_SECONDS)
                await self._forget([one for one in released if not links.exists(one.link)])
                await self._delete_links_of(released)
            # No await since the leases were looked at: what is released from now on sets it again.
            self._released.clear()
            await self._released.wait()

    async def _delete_links_of(self, released: Sequence[Lease]) -> None:
        for lease in released:
            overdue = time.time_ns() - lease.released_at > _PATIENCE_NS
            if overdue and links.exists(lease.link):
                await self._run(partial(links.delete, lease.link))

    async def _forget(self, released: Sequence[Lease]) -> None:
        """Free the addresses of leases whose links are gone, each once."""
        async with self._forgetting:
            gone = [lease for lease in released if self._ipam.leases.get(lease.pod_id) == lease]
            senders = [element for lease in gone for element in spoofing.elements(lease)]
            # Before the leases: then others may get the addresses, and with them the same elements of the filter.
            if self._filter is not None and senders:
                await self._run(partial(self._filter.remove, senders))
            for lease in gone:
                self._ipam.forget(lease)

    # --- threads ---

    async def _run(self, work: Callable[[], None]) -> None:
        """Run in a thread and wait for its end even if cancelled: descriptors that it uses must not be closed."""
        await to_the_end(self._workers, work)

    def _run_behind(self, work: Callable[[], None]) -> None:
        """Run in a thread without waiting; a failure is logged."""
        self._tasks.run("host ports", self._run(work))


def _warn_of_listeners(ports: Sequence[HostPort], versions: Collection[int]) -> None:
    for warning in listeners.warnings(ports, versions):
        log.warning("%s", warning)
