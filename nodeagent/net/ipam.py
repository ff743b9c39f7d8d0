"""Addresses of pods: pools that hand them out in turn, and the leases that the store remembers.

A lease is written before its address is used and forgotten after its link is gone, so that a crash leaks no address and
no address is ever on two links.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Sequence
from ipaddress import ip_address, ip_interface

import msgspec

from nodeagent.errors import ResourceExhausted
from nodeagent.net.addresses import Address, Interface, Subnet, gateway, link_local, mac_of
from nodeagent.records import Lease, Sandbox
from nodeagent.store import Store

_LINK_NUMBERS = 1 << 20


class Pool:
    """The addresses of a subnet that pods can have: all but the gateway's, the network's and the broadcast address."""

    def __init__(self, subnet: Subnet) -> None:
        self.subnet = subnet
        self._first = int(subnet.network_address) + 2
        self._last = int(subnet.broadcast_address) - (1 if subnet.version == 4 else 0)
        self._next = self._first

    @property
    def size(self) -> int:
        return self._last - self._first + 1

    def take(self, taken: Collection[Address]) -> Interface:
        """Return the next free address in turn, so that one given back rests as long as possible."""
        for _ in range(min(self.size, len(taken) + 1)):  # of so many at least one is free
            interface = ip_interface((self._next, self.subnet.prefixlen))
            self.skip(interface)
            if interface.ip not in taken:
                return interface
        raise ResourceExhausted(f"subnet {self.subnet}: all {self.size} addresses are taken")

    def skip(self, interface: Interface) -> None:
        """Go on after this address."""
        after = int(interface.ip) + 1
        self._next = after if self._first <= after <= self._last else self._first


class Ipam:
    """Leases: one address of each of `subnets`, and the name of a link that begins with `link_prefix`."""

    def __init__(self, store: Store, link_prefix: str, subnets: Sequence[Subnet]) -> None:
        self._store = store
        self._link_prefix = link_prefix
        self._pools: dict[Subnet, Pool] = {}
        self._current: list[Pool] = []
        self._taken: set[Address] = set()  # of all pools, which may overlap
        self.leases: dict[str, Lease] = {}
        # In the order in which they were acquired, so that each pool goes on after its latest lease.
        for lease in sorted(store.all(Lease), key=lambda lease: lease.acquired_at):
            self.leases[lease.pod_id] = lease
            for interface in interfaces(lease):
                self._pool(interface.network).skip(interface)
                self._taken.add(interface.ip)
        # Of a lease that cannot be read, the pod's record has the addresses.
        self.unreadable = set(store.unreadable(Lease))
        for sandbox in filter(None, (store.get(Sandbox, pod_id) for pod_id in self.unreadable)):
            self._taken.update(map(ip_address, sandbox.addresses))
        self.use(subnets)

    def use(self, subnets: Sequence[Subnet]) -> None:
        """Take new leases from these subnets; leases that are held stay."""
        self._current = [self._pool(subnet) for subnet in subnets]

    @property
    def subnets(self) -> tuple[Subnet, ...]:
        """The subnets in use: those for new leases first, then those of old ones."""
        held = (i.network for lease in self.leases.values() for i in interfaces(lease))
        return tuple(dict.fromkeys([*(pool.subnet for pool in self._current), *held]))

    def acquire(self, pod_id: str) -> Lease:
        """Lease addresses to a pod, or return the lease that it has. Raises `ResourceExhausted`."""
        if held := self.leases.get(pod_id):
            return held
        taken = [pool.take(self._taken) for pool in self._current]
        lease = Lease(
            pod_id=pod_id,
            addresses=tuple(map(str, taken)),
            link=self._new_link(),
            acquired_at=time.time_ns(),
        )
        self._store.put(lease)
        self._taken.update(interface.ip for interface in taken)
        self.leases[pod_id] = lease
        return lease

    def release(self, pod_id: str) -> Lease | None:
        """Note that the pod is gone. Its link may still be there, so its addresses rest until `forget`."""
        lease = self.leases.get(pod_id)
        if pod_id in self.unreadable:
            self._store.delete(Lease, pod_id)
            self.unreadable.discard(pod_id)
        if lease is not None and not lease.released_at:
            lease = msgspec.structs.replace(lease, released_at=time.time_ns())
            # Before the store, which may fail: nobody calls this again for a pod that could not be made. The next
            # agent releases what belongs to no pod.
            self.leases[pod_id] = lease
            self._store.put(lease)
        return lease

    def forget(self, lease: Lease) -> None:
        """Free the addresses of a lease, whose link is gone."""
        if self.leases.get(lease.pod_id) == lease:
            self._store.delete(Lease, lease.pod_id)
            del self.leases[lease.pod_id]
            self._taken.difference_update(interface.ip for interface in interfaces(lease))

    def released(self) -> list[Lease]:
        return [lease for lease in self.leases.values() if lease.released_at]

    def holder(self, address: Address) -> str | None:
        """The id of the pod that has an address."""
        for lease in self.leases.values():
            if any(interface.ip == address for interface in interfaces(lease)):
                return lease.pod_id
        return None

    def _pool(self, subnet: Subnet) -> Pool:
        if subnet not in self._pools:
            self._pools[subnet] = Pool(subnet)
            self._taken.add(gateway(subnet).ip)
        return self._pools[subnet]

    def _new_link(self) -> str:
        names = {lease.link for lease in self.leases.values()}
        while (name := f"{self._link_prefix}{secrets.randbelow(_LINK_NUMBERS):05x}") in names:
            pass
        return name


def interfaces(lease: Lease) -> list[Interface]:
    return [ip_interface(address) for address in lease.addresses]


def mac(lease: Lease) -> bytes:
    """The MAC address of the pod's end of the link."""
    return mac_of(interfaces(lease)[0])


def with_link_local(lease: Lease) -> list[Interface]:
    """All addresses of the pod's end of the link, with IPv6 a link-local one as well."""
    own = interfaces(lease)
    return [*own, link_local(mac(lease))] if any(i.version == 6 for i in own) else own
