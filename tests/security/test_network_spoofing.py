"""Attacks of pods on the network, with real frames: forged addresses, false routers, ports of the node's loopback.

The attacker is a pod with CAP_NET_RAW, which containers have unless they drop it. Each forged frame is also sent where
nothing protects, to show that it would have arrived.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
)
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import ip_interface
from pathlib import Path
from typing import Any

import pytest

from nodeagent.net.addresses import link_local, mac_of, mac_of_bridge
from nodeagent.net.network import Network, NetworkConfig, PortMapping
from nodeagent.store import Store
from nodeagent.tasks import Tasks
from tests.kernel.net import frames as f
from tests.kernel.net.conftest import INSTANCE, PodMaker, World, new_pod, store, world
from tests.kernel.net.frames import Station, Wire
from tests.kernel.net.world import (
    NEIGHBOUR4,
    NODE4,
    PATIENCE_SECONDS,
    REFUSED_SECONDS,
    Namespace,
    Pod,
    Where,
    ask_tcp,
    ask_udp,
    needs_bridge_tables,
    needs_nf_tables,
    tcp_echo_of_peer,
    udp_echo_of_peer,
)

__all__ = ["new_pod", "store", "world"]

BRIDGE = f"na{INSTANCE}"
PORT, HOST_PORT, OPEN_PORT = 8080, 80, 81
TOKEN = b"forged"
OUTSIDE4, OUTSIDE6 = "203.0.113.7", "2001:db8:7::7"
EVIL_ROUTER, EVIL_PREFIX = "fe80::bad", "2001:db8:bad::"
GROUP4 = "239.1.2.3"
EXPERIMENT = 253  # an upper-layer protocol of nobody (RFC 3692)

IPV4_ONLY = {"subnet6": ""}
DUAL_STACK = {"subnet6": "fd00:1::/64"}
HAS_BR_NETFILTER = Path("/proc/sys/net/bridge").exists()
ON_AND_OFF = pytest.mark.parametrize(
    "spoof_protection",
    [
        pytest.param(True, marks=needs_bridge_tables, id="protected"),
        pytest.param(False, id="unprotected"),
    ],
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Two pods on a bridge, of which one attacks. port: the node's end of its link."""

    node: Namespace
    network: Network
    attacking: Pod
    attacked: Pod
    attacker: Station
    victim: Station
    gateway: Station
    port: str
    wire: Wire
    of_victim: Wire
    of_bridge: Wire
    of_port: Wire

    async def arrives(self, frames: list[bytes]) -> bool:
        """Whether any of the frames gets to the victim, or by the bridge to the node."""
        # A bridge forgets where the victim is when it believes a forged frame: it says so again.
        await f.transmit(partial(tell_all, self.of_victim, self.victim, []), self.wire)
        send = partial(tell_all, self.wire, self.attacker, frames)
        return was_seen(await f.transmit(send, self.of_victim, self.of_bridge))

    async def send(self, *frames: bytes) -> None:
        """Send, and wait until the node's kernel has dealt with the frames, which it does one after the other."""
        await f.transmit(partial(tell_all, self.wire, self.attacker, list(frames)), self.of_port)


def tell_all(wire: Wire, sender: Station, frames: list[bytes], last: bytes) -> None:
    """Send frames, and after them an honest one to everybody."""
    packet = f.ipv4(sender.ip4, "255.255.255.255", f.udp(last))
    wire.send(*frames, f.ethernet(f.BROADCAST, sender.mac, f.IPV4, packet))


def was_seen(frames: list[bytes]) -> bool:
    return any(TOKEN in frame for frame in frames)


Opened = Callable[..., AbstractAsyncContextManager[Scene]]


@pytest.fixture
def opened(world: World, store: Store, new_pod: PodMaker) -> Opened:
    """Makes a scene on the node of `world`, with these settings of the network."""

    @asynccontextmanager
    async def scene(**settings: Any) -> AsyncIterator[Scene]:
        config = NetworkConfig(**settings)
        async with AsyncExitStack() as stack:
            network = await Network.start(
                config=config, store=store, instance=INSTANCE, tasks=Tasks()
            )
            stack.push_async_callback(network.close, remove=True)
            attacking, *attackers = await new_pod(network)
            attacked, *victims = await new_pod(network)
            port = network._ipam.leases[attacking.id].link
            wires = [
                stack.enter_context(Wire(namespace, link))
                for namespace, link in (
                    (attacking.namespace, "eth0"),
                    (attacked.namespace, "eth0"),
                    (world.node, BRIDGE),
                    (world.node, port),
                )
            ]
            yield Scene(
                node=world.node,
                network=network,
                attacking=attacking,
                attacked=attacked,
                attacker=station(attackers[0], attackers[1]),
                victim=station(victims[0], victims[1]),
                gateway=station("10.88.0.1", "fd00:1::1", mac_of_bridge(INSTANCE)),
                port=port,
                wire=wires[0],
                of_victim=wires[1],
                of_bridge=wires[2],
                of_port=wires[3],
            )

    return scene


def station(ip4: str, ip6: str, mac: bytes | None = None) -> Station:
    mac = mac or mac_of(ip_interface(ip4))
    return Station(mac=mac, ip4=ip4, ip6=ip6, link_local=str(link_local(mac).ip))


# --- forged frames --------------------------------------------------------------------------------------------------


def ethernet(s: Scene, kind: int, payload: bytes, to: bytes, by: bytes = b"") -> bytes:
    return f.ethernet(to, by or s.attacker.mac, kind, payload)


def arp(s: Scene, says: tuple[bytes, str], to: Station, by: bytes = b"") -> bytes:
    return ethernet(s, f.ARP, f.arp(f.REPLY, says, (to.mac, to.ip4)) + TOKEN, to.mac, by)


def ip4(s: Scene, source: str, to: Station, by: bytes = b"") -> bytes:
    return ethernet(s, f.IPV4, f.ipv4(source, to.ip4, f.udp(TOKEN)), to.mac, by)


def ip6(s: Scene, source: str, to: Station, by: bytes = b"") -> bytes:
    payload = f.ipv6(source, to.ip6, TOKEN, following=EXPERIMENT)
    return ethernet(s, f.IPV6, payload, to.mac, by)


def icmp6(source: str, kind: int, body: bytes, to: str = f.ALL_NODES) -> bytes:
    """The message alone."""
    return f.icmpv6(source, to, kind, body + f.nonce(TOKEN))


def nd(s: Scene, kind: int, body: bytes, source: str = "", to: str = f.ALL_NODES) -> bytes:
    source = source or s.attacker.link_local
    packet = f.ipv6(source, to, icmp6(source, kind, body, to))
    return ethernet(s, f.IPV6, packet, f.multicast_mac(f.ALL_NODES))


def advertises_router(s: Scene, *, source: str = "", to: bytes = b"") -> bytes:
    source = source or s.attacker.link_local
    message = icmp6(source, f.ROUTER_ADVERTISEMENT, f.advertised_router(EVIL_PREFIX))
    packet = f.ipv6(source, f.ALL_NODES, message)
    return ethernet(s, f.IPV6, packet, to or f.multicast_mac(f.ALL_NODES))


def hidden(s: Scene, first: int, payloads: list[bytes]) -> list[bytes]:
    """Packets of IPv6 to all nodes that begin with the extension header `first`."""
    return [
        ethernet(
            s,
            f.IPV6,
            f.ipv6(s.attacker.link_local, f.ALL_NODES, payload, following=first),
            f.multicast_mac(f.ALL_NODES),
        )
        for payload in payloads
    ]


def neighbour(s: Scene, whose: str) -> bytes:
    return f.advertised_neighbour(whose, s.attacker.mac)


def router_message(s: Scene) -> bytes:
    source = s.attacker.link_local
    return icmp6(source, f.ROUTER_ADVERTISEMENT, f.advertised_router(EVIL_PREFIX))


Forge = Callable[[Scene], list[bytes]]

FORGED: dict[str, Forge] = {
    "ARP: the victim is here, to the node": lambda s: [
        arp(s, (s.attacker.mac, s.victim.ip4), s.gateway)
    ],
    "ARP: the gateway is here, to the victim": lambda s: [
        arp(s, (s.attacker.mac, s.gateway.ip4), s.victim)
    ],
    "ARP: the attacker's address is at the victim's MAC": lambda s: [
        arp(s, (s.victim.mac, s.attacker.ip4), s.gateway)
    ],
    "ARP from the victim's MAC": lambda s: [
        arp(s, (s.victim.mac, s.victim.ip4), s.gateway, by=s.victim.mac)
    ],
    "ARP probe for the victim's address": lambda s: [arp(s, (s.attacker.mac, "0.0.0.0"), s.victim)],
    "ARP of other hardware": lambda s: [
        ethernet(
            s,
            f.ARP,
            b"\0\x06"
            + f.arp(f.REPLY, (s.attacker.mac, s.attacker.ip4), (f.NO_MAC, s.victim.ip4))[2:]
            + TOKEN,
            s.victim.mac,
        )
    ],
    "IPv4 from the victim": lambda s: [ip4(s, s.victim.ip4, s.gateway)],
    "IPv4 from the gateway": lambda s: [ip4(s, s.gateway.ip4, s.victim)],
    "IPv4 from outside": lambda s: [ip4(s, OUTSIDE4, s.victim)],
    "IPv4 from the node's loopback": lambda s: [ip4(s, "127.0.0.1", s.victim)],
    "IPv4 from nobody, as DHCP": lambda s: [ip4(s, "0.0.0.0", s.gateway)],
    "IPv4 from the victim's MAC": lambda s: [ip4(s, s.attacker.ip4, s.gateway, by=s.victim.mac)],
    "IPv4 from the victim, MAC and address": lambda s: [
        ip4(s, s.victim.ip4, s.gateway, by=s.victim.mac)
    ],
    "IPv4 with a tag of VLAN 0": lambda s: [
        ethernet(s, f.VLAN, f.tag(0, f.IPV4) + _from_victim(s), s.gateway.mac)
    ],
    "IPv4 with two tags": lambda s: [
        ethernet(s, f.QINQ, f.tag(0, f.VLAN) + f.tag(0, f.IPV4) + _from_victim(s), s.gateway.mac)
    ],
    "own IPv4 with a tag": lambda s: [
        ethernet(
            s,
            f.VLAN,
            f.tag(5, f.IPV4) + f.ipv4(s.attacker.ip4, s.victim.ip4, f.udp(TOKEN)),
            s.victim.mac,
        )
    ],
    "IPv4 in LLC and SNAP": lambda s: [
        ethernet(s, 100, f.LLC_SNAP + b"\x08\0" + _from_victim(s), s.gateway.mac)
    ],
    **{
        f"EtherType {kind:04x}": lambda s, kind=kind: [ethernet(s, kind, TOKEN, f.BROADCAST)]  # type: ignore[misc]
        for kind in (f.RARP, f.PPPOE_DISCOVERY, f.EAPOL, f.LLDP)
    },
    "spanning tree": lambda s: [
        ethernet(s, 38, b"\x42\x42\x03" + bytes(35) + TOKEN, bytes.fromhex("0180c2000000"))
    ],
}

FORGED6: dict[str, Forge] = {
    "IPv6 from the victim": lambda s: [ip6(s, s.victim.ip6, s.gateway)],
    "IPv6 from the victim's link-local address": lambda s: [ip6(s, s.victim.link_local, s.gateway)],
    "IPv6 from the gateway": lambda s: [ip6(s, s.gateway.ip6, s.victim)],
    "IPv6 from outside": lambda s: [ip6(s, OUTSIDE6, s.victim)],
    "IPv6 from nobody": lambda s: [ip6(s, "::", s.victim)],
    "IPv6 from the victim's MAC": lambda s: [ip6(s, s.attacker.ip6, s.gateway, by=s.victim.mac)],
    "router advertisement": lambda s: [advertises_router(s)],
    "router advertisement from the gateway": lambda s: [
        advertises_router(s, source=s.gateway.link_local)
    ],
    "router advertisement behind hop-by-hop options": lambda s: hidden(
        s, f.HOP_BY_HOP, [f.options(f.ICMPV6) + router_message(s)]
    ),
    "router advertisement behind three headers": lambda s: hidden(
        s,
        f.HOP_BY_HOP,
        [
            f.options(f.DESTINATION_OPTIONS)
            + f.options(f.DESTINATION_OPTIONS)
            + f.options(f.ICMPV6)
            + router_message(s)
        ],
    ),
    "router advertisement as the only fragment": lambda s: hidden(
        s, f.FRAGMENT, [f.fragment(f.ICMPV6, router_message(s))]
    ),
    "router advertisement in the second fragment": lambda s: hidden(
        s,
        f.FRAGMENT,
        [
            f.fragment(f.DESTINATION_OPTIONS, f.options(f.ICMPV6), more=True),
            f.fragment(f.DESTINATION_OPTIONS, router_message(s), offset=8),
        ],
    ),
    "router advertisement with a tag of VLAN 0": lambda s: [
        ethernet(
            s, f.VLAN, f.tag(0, f.IPV6) + advertises_router(s)[14:], f.multicast_mac(f.ALL_NODES)
        )
    ],
    "redirect": lambda s: [nd(s, f.REDIRECT, f.redirected(s.attacker.link_local, OUTSIDE6))],
    "neighbour advertisement: the victim is here": lambda s: [
        nd(s, f.ADVERTISEMENT, neighbour(s, s.victim.ip6), s.attacker.ip6)
    ],
    "neighbour advertisement: the gateway is here": lambda s: [
        nd(s, f.ADVERTISEMENT, neighbour(s, s.gateway.link_local))
    ],
    "neighbour advertisement behind options": lambda s: hidden(
        s,
        f.DESTINATION_OPTIONS,
        [
            f.options(f.ICMPV6)
            + icmp6(s.attacker.link_local, f.ADVERTISEMENT, neighbour(s, s.victim.ip6))
        ],
    ),
    "neighbour solicitation from the victim": lambda s: [
        nd(
            s,
            f.SOLICITATION,
            f.solicited_neighbour(s.gateway.ip6, s.attacker.mac),
            s.victim.ip6,
        )
    ],
    "duplicate address detection": lambda s: [
        nd(s, f.SOLICITATION, bytes(4) + f.packed(s.victim.ip6), "::")
    ],
}


def _from_victim(s: Scene) -> bytes:
    return f.ipv4(s.victim.ip4, s.gateway.ip4, f.udp(TOKEN))


async def arrivals(scene: Scene, attacks: dict[str, Forge]) -> set[str]:
    """The names of those that arrive, if only once: a busy machine loses frames."""
    names = [name for name in attacks for _ in range(3)]
    return {name for name in names if await scene.arrives(attacks[name](scene))}


def without_br_netfilter(node: Namespace) -> None:
    """It puts fragments together, and shows bridged packets to tables of other families."""
    if HAS_BR_NETFILTER:
        for name in ("bridge-nf-call-iptables", "bridge-nf-call-ip6tables"):
            node.write(f"net/bridge/{name}", "0")


@needs_bridge_tables
@pytest.mark.parametrize("netfilter", ["bridged", "routed"])
async def test_forged_frames_do_not_arrive(opened: Opened, netfilter: str) -> None:
    async with opened(**DUAL_STACK) as scene:
        if netfilter == "routed":
            without_br_netfilter(scene.node)
        assert await arrivals(scene, FORGED | FORGED6) == set()


async def test_forged_frames_arrive_without_protection(opened: Opened) -> None:
    async with opened(**DUAL_STACK, spoof_protection=False) as scene:
        without_br_netfilter(scene.node)
        assert await arrivals(scene, FORGED | FORGED6) == {*FORGED, *FORGED6}


# --- honest frames --------------------------------------------------------------------------------------------------

HONEST: dict[str, Forge] = {
    "ARP": lambda s: [arp(s, (s.attacker.mac, s.attacker.ip4), s.victim)],
    "gratuitous ARP": lambda s: [
        ethernet(
            s,
            f.ARP,
            f.arp(f.REQUEST, (s.attacker.mac, s.attacker.ip4), (f.NO_MAC, s.attacker.ip4)) + TOKEN,
            f.BROADCAST,
        )
    ],
    "IPv4": lambda s: [ip4(s, s.attacker.ip4, s.victim)],
    "IPv4 multicast": lambda s: [
        ethernet(
            s,
            f.IPV4,
            f.ipv4(s.attacker.ip4, GROUP4, f.udp(TOKEN)),
            f.multicast_mac(GROUP4),
        )
    ],
}
HONEST6: dict[str, Forge] = {
    "IPv6": lambda s: [ip6(s, s.attacker.ip6, s.victim)],
    "IPv6 from the link-local address": lambda s: [ip6(s, s.attacker.link_local, s.victim)],
    "IPv6 behind options": lambda s: hidden(s, f.HOP_BY_HOP, [f.options(EXPERIMENT) + TOKEN]),
    "neighbour advertisement": lambda s: [nd(s, f.ADVERTISEMENT, neighbour(s, s.attacker.ip6))],
    "neighbour solicitation": lambda s: [
        nd(s, f.SOLICITATION, f.solicited_neighbour(s.victim.ip6, s.attacker.mac), s.attacker.ip6)
    ],
    "router solicitation": lambda s: [nd(s, f.ROUTER_SOLICITATION, bytes(4))],
    "echo behind options": lambda s: hidden(
        s,
        f.DESTINATION_OPTIONS,
        [f.options(f.ICMPV6) + icmp6(s.attacker.link_local, f.ECHO, bytes(4))],
    ),
    "first fragment of an echo": lambda s: hidden(
        s,
        f.FRAGMENT,
        [f.fragment(f.ICMPV6, icmp6(s.attacker.link_local, f.ECHO, bytes(4)), more=True)],
    ),
    "last fragment of an echo": lambda s: hidden(
        s, f.FRAGMENT, [f.fragment(f.ICMPV6, TOKEN, offset=16)]
    ),
}


async def test_honest_frames_arrive(opened: Opened) -> None:
    async with opened(**DUAL_STACK) as scene:
        without_br_netfilter(scene.node)
        assert await arrivals(scene, HONEST | HONEST6) == {*HONEST, *HONEST6}


@needs_bridge_tables
async def test_pods_without_ipv6_send_none(opened: Opened) -> None:
    async with opened() as scene:
        made_up = replace(
            scene,
            attacker=replace(scene.attacker, ip6="fd00:1::2"),
            victim=replace(scene.victim, ip6="fd00:1::3"),
        )
        assert await arrivals(made_up, FORGED | FORGED6 | HONEST6) == set()
        assert await arrivals(scene, HONEST) == {*HONEST}


# --- false routers --------------------------------------------------------------------------------------------------


async def routing6(node: Namespace) -> tuple[list[Any], list[Any]]:
    """Default routes and addresses of IPv6."""
    async with node.routing() as ipr:
        routes = [route.get("gateway") async for route in await ipr.get_default_routes(family=10)]
        return routes, [address.get("address") async for address in await ipr.get_addr(family=10)]


@ON_AND_OFF
@pytest.mark.parametrize("stack", [IPV4_ONLY, DUAL_STACK], ids=["ipv4", "dual"])
@pytest.mark.parametrize(
    "group",
    [f.multicast_mac(f.ALL_NODES), f.NEAREST_BRIDGE, f.LACP],
    ids=["all-nodes", "nearest-bridge", "lacp"],
)
async def test_cve_2020_10749_a_pod_is_no_router_of_the_node(
    opened: Opened, spoof_protection: bool, stack: dict[str, str], group: bytes
) -> None:
    async with opened(**stack, spoof_protection=spoof_protection) as scene:
        scene.node.write("net/ipv6/conf/all/forwarding", "0")
        before = await routing6(scene.node)
        await scene.send(
            *(advertises_router(scene, source=source, to=group) for source in ("", EVIL_ROUTER))
        )
        assert await routing6(scene.node) == before


@ON_AND_OFF
async def test_cve_2020_10749_while_the_bridge_is_gone(
    opened: Opened, spoof_protection: bool
) -> None:
    """Others may delete the bridge: what were its ports are links of the node like any other, until it is made anew."""
    async with opened(spoof_protection=spoof_protection) as scene:
        before = await routing6(scene.node)
        async with scene.node.routing() as ipr:
            await ipr.link("del", index=scene.node.links()[BRIDGE])
        with listener(scene.node, (NODE4, PORT)) as service:
            datagram = f.ipv4(scene.attacker.ip4, NODE4, f.udp(TOKEN, PORT))
            await scene.send(
                advertises_router(scene, source=EVIL_ROUTER),
                ethernet(scene, f.IPV4, datagram, f.BROADCAST),
            )
            assert heard(service) == []
        assert await routing6(scene.node) == before


@contextmanager
def listener(namespace: Namespace, where: Where) -> Iterator[socket.socket]:
    with namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
        opened.bind(where)
        yield opened


def heard(listening: socket.socket) -> list[bytes]:
    datagrams = []
    while True:
        try:
            datagrams.append(listening.recv(100))
        except BlockingIOError:
            return datagrams


# --- ways past the bridge's tables ----------------------------------------------------------------------------------


@needs_nf_tables
@ON_AND_OFF
@pytest.mark.parametrize("group", [f.NEAREST_BRIDGE, f.LACP], ids=["nearest-bridge", "lacp"])
async def test_no_frame_comes_to_the_node_by_the_port_itself(
    opened: Opened, spoof_protection: bool, group: bytes
) -> None:
    """Else the operator's rules for what comes by the bridge would not see it."""
    rules = f"""
        table inet operators {{
            chain input {{ type filter hook input priority 0; iifname "{BRIDGE}" drop; }}
        }}
    """
    async with opened(spoof_protection=spoof_protection) as scene:
        load(rules)
        with listener(scene.node, (NODE4, PORT)) as service:
            for to in (scene.gateway.mac, group):
                datagram = f.ipv4(scene.attacker.ip4, NODE4, f.udp(TOKEN, PORT))
                await scene.send(ethernet(scene, f.IPV4, datagram, to))
            assert heard(service) == []


def load(rules: str) -> None:
    subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True)


async def test_a_pod_does_not_decide_where_multicast_goes(opened: Opened) -> None:
    """By a query, after which the bridge would withhold a group from all who have not told it that they want it."""
    async with opened() as scene:
        query = f.ipv4(
            scene.attacker.ip4, "224.0.0.1", f.igmp_query(longest_answer=1), protocol=f.IGMP
        )
        await scene.send(ethernet(scene, f.IPV4, query, f.multicast_mac("224.0.0.1")))
        await asyncio.sleep(0.2)  # from when on the answers would count
        assert await scene.arrives(HONEST["IPv4 multicast"](scene))


@needs_bridge_tables
async def test_the_bridge_learns_no_foreign_mac_address(opened: Opened) -> None:
    async with opened() as scene:
        before = stations_of(scene.port)
        macs = [scene.victim.mac, *(b"\x0a\x00\x00\x00\x00" + bytes([n]) for n in range(100))]
        await scene.send(*(ip4(scene, scene.attacker.ip4, scene.gateway, by=mac) for mac in macs))
        assert stations_of(scene.port) == before | {scene.attacker.mac.hex(":")}


def stations_of(port: str) -> set[str]:
    return {entry["mac"] for entry in shown("bridge", "fdb", "show", "dev", port)}


def shown(program: str, *arguments: str) -> list[dict[str, Any]]:
    """What a program of iproute2 tells about the node."""
    command = [program, "-json", *arguments]
    listed = subprocess.run(command, capture_output=True, check=True).stdout
    return list(json.loads(listed))


# --- pods with CAP_NET_ADMIN ----------------------------------------------------------------------------------------


@needs_bridge_tables
@pytest.mark.parametrize("what", ["MAC address", "IPv4 address", "both"])
async def test_a_pod_that_takes_anothers_addresses_harms_only_itself(
    opened: Opened, what: str
) -> None:
    async with (
        opened() as scene,
        tcp_echo_of_peer(scene.attacked.namespace, (scene.victim.ip4, PORT)),
    ):
        index = scene.attacking.namespace.links()["eth0"]
        async with scene.attacking.namespace.routing() as ipr:
            if what != "IPv4 address":
                await ipr.link("set", index=index, address=scene.victim.mac.hex(":"))
            if what != "MAC address":
                await ipr.addr("add", index=index, address=scene.victim.ip4, prefixlen=16)
        source = scene.attacker.ip4 if what == "MAC address" else scene.victim.ip4
        with scene.attacking.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as talking:
            talking.bind((source, 0))
            for _ in range(3):
                talking.sendto(TOKEN, (scene.gateway.ip4, PORT))
        assert await ask_tcp(scene.node, (scene.victim.ip4, PORT)) == scene.gateway.ip4


async def test_a_pod_can_route_for_others_where_that_is_configured(opened: Opened) -> None:
    assert await routed_by_a_pod(opened, spoof_protection=False)


@needs_bridge_tables
async def test_a_pod_can_not_route_for_others(opened: Opened) -> None:
    assert not await routed_by_a_pod(opened, spoof_protection=True)


async def routed_by_a_pod(opened: Opened, *, spoof_protection: bool) -> bool:
    """Whether the node reaches an address behind a pod, by a route to that pod."""
    async with opened(spoof_protection=spoof_protection) as scene:
        inside = scene.attacking.namespace
        async with inside.routing() as ipr:
            await ipr.addr("add", index=1, address=OUTSIDE4, prefixlen=32)
        async with scene.node.routing() as ipr:
            await ipr.route("add", dst=f"{OUTSIDE4}/32", gateway=scene.attacker.ip4)
        async with udp_echo_of_peer(inside, (OUTSIDE4, PORT)):
            try:
                patience = REFUSED_SECONDS if spoof_protection else PATIENCE_SECONDS
                return await ask_udp(scene.node, (OUTSIDE4, PORT), patience) == scene.gateway.ip4
            except TimeoutError:
                return False


# --- host ports -----------------------------------------------------------------------------------------------------


async def publish(scene: Scene) -> None:
    """One port of the victim on the node's loopback only, and one on all its addresses."""
    await scene.network.publish(
        scene.attacked.id,
        [
            PortMapping(
                protocol="udp", container_port=PORT, host_port=HOST_PORT, host_ip="127.0.0.1"
            ),
            PortMapping(protocol="udp", container_port=PORT, host_port=OPEN_PORT),
        ],
    )


def try_loopback(
    wire: Wire, source: str, host_port: int, mac: tuple[bytes, bytes], last: bytes
) -> None:
    """A forged packet to the node's loopback, then an honest one to the port that is open."""
    for address, port, payload in (("127.0.0.1", host_port, TOKEN), (NODE4, OPEN_PORT, last)):
        wire.send(f.ethernet(*mac, f.IPV4, f.ipv4(source, address, f.udp(payload, port))))


@needs_nf_tables
@ON_AND_OFF
@pytest.mark.parametrize("host_port", [HOST_PORT, OPEN_PORT])
async def test_neighbours_of_the_node_do_not_reach_host_ports_of_its_loopback(
    opened: Opened, world: World, spoof_protection: bool, host_port: int
) -> None:
    (wan,) = shown("ip", "link", "show", "wan")
    mac = bytes.fromhex(wan["address"].replace(":", "")), bytes.fromhex("020000000001")
    async with opened(spoof_protection=spoof_protection) as scene:
        await publish(scene)
        with Wire(world.neighbour, "wan") as wire:
            send = partial(try_loopback, wire, NEIGHBOUR4, host_port, mac)
            assert not was_seen(await f.transmit(send, scene.of_victim))


@needs_nf_tables
@ON_AND_OFF
@pytest.mark.parametrize("host_port", [HOST_PORT, OPEN_PORT])
async def test_pods_do_not_reach_host_ports_of_the_nodes_loopback(
    opened: Opened, spoof_protection: bool, host_port: int
) -> None:
    async with opened(spoof_protection=spoof_protection) as scene:
        await publish(scene)
        mac = scene.gateway.mac, scene.attacker.mac
        send = partial(try_loopback, scene.wire, scene.attacker.ip4, host_port, mac)
        assert not was_seen(await f.transmit(send, scene.of_victim))


@ON_AND_OFF
async def test_cve_2020_8558_services_of_the_nodes_loopback(
    opened: Opened, spoof_protection: bool
) -> None:
    async with opened(spoof_protection=spoof_protection) as scene:
        with listener(scene.node, ("127.0.0.1", PORT)) as service:
            for to in (scene.gateway.mac, f.NEAREST_BRIDGE, f.LACP):
                packet = f.ipv4(scene.attacker.ip4, "127.0.0.1", f.udp(TOKEN, PORT))
                await scene.send(ethernet(scene, f.IPV4, packet, to))
            assert heard(service) == []
