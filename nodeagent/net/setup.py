"""The node's side of the pods' network: subnets, a bridge with the gateways' addresses, settings of the kernel.

It is set up at the agent's start and taken down after its last pod. Several agents on one machine do not disturb each
other: names come from the instance, the default subnet avoids existing routes, and a setting of the kernel is restored
when the last of them ends.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from ipaddress import ip_network

import msgspec

from nodeagent.config import Network as NetworkConfig
from nodeagent.errors import Unavailable
from nodeagent.net import bridge, sysctls
from nodeagent.net.addresses import (
    Interface,
    Subnet,
    free_subnet,
    gateway,
    link_local,
    mac_of_bridge,
    overlaps,
)
from nodeagent.net.bridge import IPRoute
from nodeagent.records import NodeNetwork

_DEFAULT_SUBNET4 = NetworkConfig().subnet4
_ATTEMPTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSide:
    """The node's side as it was set up. settings: of the kernel, as they have to be. problems: for the operator.

    moved: which subnet pods have in place of the default one, and why; "" where they have what is configured.
    """

    bridge: str
    index: int
    mtu: int
    subnets: tuple[Subnet, ...]
    settings: dict[str, str]
    problems: tuple[str, ...] = ()
    moved: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the node's side is made from. held: the subnets of existing pods."""

    config: NetworkConfig
    instance: str
    choices: NodeNetwork
    held: tuple[Subnet, ...] = ()

    @property
    def bridge(self) -> str:
        return self.config.bridge or f"na{self.instance}"

    @property
    def mac(self) -> bytes:
        return mac_of_bridge(self.instance)

    @property
    def versions(self) -> set[int]:
        """The versions of IP of which new pods get addresses or existing pods have some."""
        configured = {4: self.config.subnet4, 6: self.config.subnet6}
        return {v for v, subnet in configured.items() if subnet} | {s.version for s in self.held}

    def subnets(self, taken: Collection[Subnet], seed: int) -> tuple[Subnet, ...]:
        """The subnets of new pods, IPv4 first: the pod CIDR, else the configured one; a free one for the default."""
        given = {subnet.version: subnet for subnet in map(ip_network, self.choices.pod_cidrs)}
        subnets: list[Subnet] = []
        if self.config.subnet4:
            subnets.append(given.get(4) or self._subnet4())
        if self.config.subnet6:
            subnets.append(given.get(6) or ip_network(self.config.subnet6))
        if self.must_move(subnets, taken):
            subnets[0] = free_subnet(taken, int(self.instance, 16) + seed)
        return tuple(subnets)

    def must_move(self, subnets: Sequence[Subnet], taken: Collection[Subnet]) -> bool:
        """Whether the IPv4 subnet is not a configured one, has no pods yet and overlaps a route of the node."""
        if self.config.subnet4 != _DEFAULT_SUBNET4 or subnets[0] in self.held:
            return False
        chosen = str(subnets[0]) not in self.choices.pod_cidrs
        return chosen and any(overlaps(subnets[0], route) for route in taken)

    def moved(self, subnets: Sequence[Subnet], taken: Collection[Subnet]) -> str:
        """The line for the log that another subnet has taken the default one's place; "" where none has."""
        default = ip_network(_DEFAULT_SUBNET4)
        subnet = next((s for s in subnets if s.version == 4), default)
        if subnet == default or self.config.subnet4 != _DEFAULT_SUBNET4:
            return ""
        if str(subnet) in self.choices.pod_cidrs:
            return ""
        route = next((route for route in taken if overlaps(default, route)), None)
        why = (
            f"overlaps the node's route to {route}"
            if route
            else "overlapped a route when they were chosen"
        )
        return (
            f"pods get addresses of {subnet}, not of the default {default}, which {why}; "
            "network.subnet4 of the configuration can name another"
        )

    def _subnet4(self) -> Subnet:
        configured = self.config.subnet4
        return ip_network(self.choices.chosen.get(configured, configured))


async def set_up(plan: Plan) -> NodeSide:
    """Make what is missing of the node's side, and correct what is not as it should be."""
    async with bridge.rtnetlink() as ipr:
        mtu = plan.config.mtu or await bridge.default_mtu(ipr)
        of_bridge = sysctls.of_bridge(
            plan.bridge, plan.versions, check_source=plan.config.spoof_protection
        )
        index = await bridge.ensure(ipr, plan.bridge, mac=plan.mac, mtu=mtu, settings=of_bridge)
        subnets, taken = await _settle(ipr, plan, index)
        settings = await _apply_settings(ipr, plan, index, subnets) | of_bridge
    return NodeSide(
        bridge=plan.bridge,
        index=index,
        mtu=mtu,
        subnets=subnets,
        settings=settings,
        problems=tuple(_overlaps(subnets, taken)),
        moved=plan.moved(subnets, taken),
    )


async def overlapping(plan: Plan) -> list[str]:
    """Which routes of the node the subnets of pods would overlap, if they were chosen now. Changes nothing."""
    async with bridge.rtnetlink() as ipr:
        taken = await bridge.routed_subnets(ipr, but=await bridge.index_of(ipr, plan.bridge))
    return _overlaps(plan.subnets(taken, seed=0), taken)


async def tear_down(plan: Plan) -> None:
    """Remove the bridge; with the last agent's, restore the earlier settings of the kernel."""
    async with bridge.rtnetlink() as ipr:
        # Read before the bridge goes, and the note with it.
        noted = await bridge.aliases(ipr)
        await bridge.delete(ipr, plan.bridge, mac=plan.mac)
    previous = noted.pop(plan.bridge, {})
    if not noted:
        sysctls.restore(previous)


async def _settle(ipr: IPRoute, plan: Plan, index: int) -> tuple[tuple[Subnet, ...], list[Subnet]]:
    """Put the gateways' addresses on the bridge. Returns the subnets of pods, and the routes of others.

    Another agent may choose at the same time: whichever then finds the other's route beside its own chooses again.
    """
    taken = await bridge.routed_subnets(ipr, but=index)
    for seed in range(_ATTEMPTS):
        subnets = plan.subnets(taken, seed)
        addresses = [gateway(s) for s in dict.fromkeys((*subnets, *plan.held))]
        await bridge.ensure_addresses(ipr, index, [*addresses, *_link_local(plan)])
        taken = await bridge.routed_subnets(ipr, but=index)
        if not plan.must_move(subnets, taken):
            return subnets, taken
    raise Unavailable(
        f"bridge {plan.bridge}: no subnet found, routes changed {_ATTEMPTS} times meanwhile; set network.subnet4"
    )


def _link_local(plan: Plan) -> list[Interface]:
    """The bridge's link-local address, from which the kernel asks for a pod's MAC address when it forwards to it."""
    return [link_local(plan.mac)] if 6 in plan.versions else []


def _overlaps(subnets: Sequence[Subnet], taken: Collection[Subnet]) -> list[str]:
    return [
        f"subnet {subnet} of pods overlaps the node's route to {route}"
        for subnet in subnets
        for route in taken
        if overlaps(subnet, route)
    ]


async def _apply_settings(
    ipr: IPRoute, plan: Plan, index: int, subnets: Sequence[Subnet]
) -> dict[str, str]:
    versions = [subnet.version for subnet in subnets]
    advertised = await bridge.default_links(ipr, protocol=bridge.RTPROT_RA)
    wanted = sysctls.of_node(versions, advertised)
    remembered: dict[str, str] = {}
    for noted in (await bridge.aliases(ipr)).values():
        remembered |= noted
    # Noted before anything is changed, so that a crash loses no earlier value; and what was noted once counts more than
    # the present value, which may be an agent's doing.
    await bridge.set_alias(ipr, index, sysctls.differing(wanted) | remembered)
    sysctls.apply(wanted)
    return wanted


def with_choice(choices: NodeNetwork, configured: str, subnets: Sequence[Subnet]) -> NodeNetwork:
    """The choices, with the IPv4 subnet that was taken in place of the configured one."""
    chosen = [str(s) for s in subnets if s.version == 4 and str(s) not in choices.pod_cidrs]
    if not chosen:
        return choices
    return msgspec.structs.replace(choices, chosen=choices.chosen | {configured: chosen[0]})
