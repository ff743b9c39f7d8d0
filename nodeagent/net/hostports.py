"""Ports of the node that pods hold: which are free, and which pod has the others.

These are records only; `nodeagent.net.ruleset` has what forwards the packets. A port is held for every address of the
node, for every one of a family (0.0.0.0 and ::), or for one address.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address

from nodeagent.errors import AlreadyExists, InvalidArgument
from nodeagent.records import HostPort
from nodeagent.requests import PortMapping
from nodeagent.store import Store

log = logging.getLogger(__name__)

MAX_PORT = 65_535


def check(mapping: PortMapping, field: str) -> None:
    """Raise InvalidArgument with the part of `field` that is malformed. Host port 0 is a mapping that is not published.

    What the node and the pod have, and who holds the port, `HostPorts.wanted` decides.
    """
    lowest = 1 if mapping.host_port else 0
    for name, port, low in (
        ("container_port", mapping.container_port, lowest),
        ("host_port", mapping.host_port, 0),
    ):
        if not low <= port <= MAX_PORT:
            raise InvalidArgument(f"{field}.{name}: {port} is not between {low} and {MAX_PORT}")
    try:
        _address(mapping)
    except ValueError:
        raise InvalidArgument(f'{field}.host_ip: "{mapping.host_ip}" is no IP address') from None


class HostPorts:
    """The ports that pods hold, in the store and in memory."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._held: dict[str, HostPort] = {port.key: port for port in store.all(HostPort)}

    def all(self) -> list[HostPort]:
        return list(self._held.values())

    def of(self, pod_id: str) -> list[HostPort]:
        return [port for port in self._held.values() if port.pod_id == pod_id]

    def reserve(
        self, pod_id: str, mappings: Iterable[PortMapping], versions: Sequence[int]
    ) -> list[HostPort]:
        """Hold what the mappings ask for, in place of what the pod had; all of it or nothing. Raises as `wanted`."""
        ports = self.wanted(pod_id, mappings, versions)
        others = self._others(pod_id)
        with self._store.transaction():
            for old in self.of(pod_id):
                self._store.delete(HostPort, old.key)
            for port in ports:
                self._store.put(port)
        # After the transaction: where that fails, memory and store still agree.
        self._held = {port.key: port for port in (*others, *ports)}
        return ports

    def wanted(
        self, pod_id: str, mappings: Iterable[PortMapping], versions: Sequence[int]
    ) -> list[HostPort]:
        """The ports that the mappings ask for, each once; they have passed `check`, and have a host port.

        versions: of the pod's addresses. Raises `AlreadyExists` for a port that another pod, or another mapping, has.
        """
        ports: list[HostPort] = []
        others = self._others(pod_id)
        for mapping in mappings:
            port = _host_port(pod_id, mapping, versions)
            if port is not None and port not in ports:
                _refuse_conflict(port, [*others, *ports])
                ports.append(port)
        return ports

    def _others(self, pod_id: str) -> list[HostPort]:
        return [port for port in self._held.values() if port.pod_id != pod_id]

    def release(self, pod_id: str) -> None:
        """Free every port of a pod."""
        self.reserve(pod_id, (), ())


def _host_port(pod_id: str, mapping: PortMapping, versions: Sequence[int]) -> HostPort | None:
    """The port of a mapping; None for an address of a family that the pod lacks, which CNI's portmap ignores too."""
    host = _address(mapping)
    if host is not None and host.version not in versions:
        log.warning(
            "port mapping %s %d of host_ip %s: ignored, as the pod has no IPv%d address",
            mapping.protocol,
            mapping.host_port,
            host,
            host.version,
        )
        return None
    return HostPort(
        protocol=mapping.protocol,
        host_ip=str(host or ""),
        host_port=mapping.host_port,
        pod_id=pod_id,
        container_port=mapping.container_port,
    )


def _address(mapping: PortMapping) -> IPv4Address | IPv6Address | None:
    return ip_address(mapping.host_ip) if mapping.host_ip else None


def _refuse_conflict(port: HostPort, held: Sequence[HostPort]) -> None:
    for other in held:
        if _overlap(port, other):
            where = f" of {port.host_ip}" if port.host_ip else ""
            raise AlreadyExists(
                f'host port {port.protocol} {port.host_port}{where}: pod "{other.pod_id}" has it'
            )


def _overlap(one: HostPort, other: HostPort) -> bool:
    if (one.protocol, one.host_port) != (other.protocol, other.host_port):
        return False
    if not one.host_ip or not other.host_ip:
        return True
    first, second = ip_address(one.host_ip), ip_address(other.host_ip)
    same_family = first.version == second.version
    return same_family and (first == second or first.is_unspecified or second.is_unspecified)
