"""Reachability of pods, node and outside, with real packets."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from nodeagent.net.network import Network, PortMapping
from tests.kernel.net.conftest import PodMaker, World
from tests.kernel.net.world import (
    NEIGHBOUR4,
    NEIGHBOUR6,
    NODE4,
    NODE6,
    REFUSED_SECONDS,
    ask_tcp,
    ask_udp,
    needs_nf_tables,
    tcp_echo_of_peer,
    udp_echo_of_peer,
    until,
)

PORT = 8080
HOST_PORT = 80
ASK = {"tcp": ask_tcp, "udp": ask_udp}
SERVE = {"tcp": tcp_echo_of_peer, "udp": udp_echo_of_peer}


@pytest.fixture(params=["routed", "bridged"])
def netfilter(request: pytest.FixtureRequest, world: World) -> str:
    """Without and with br_netfilter handing bridged packets to the tables."""
    value = "1" if request.param == "bridged" else "0"
    if not Path("/proc/sys/net/bridge").exists():
        if value == "1":
            pytest.skip("this kernel has no br_netfilter")
        return "routed"
    for name in ("bridge-nf-call-iptables", "bridge-nf-call-ip6tables"):
        world.node.write(f"net/bridge/{name}", value)
    return str(request.param)


def mapping(protocol: str, host_ip: str = "") -> PortMapping:
    assert protocol in ("tcp", "udp")
    return PortMapping(
        protocol="tcp" if protocol == "tcp" else "udp",
        container_port=PORT,
        host_port=HOST_PORT,
        host_ip=host_ip,
    )


@pytest.mark.usefixtures("netfilter")
async def test_pods_reach_each_other_by_their_addresses(
    network: Network, new_pod: PodMaker
) -> None:
    one, one4, one6 = await new_pod(network)
    other, other4, other6 = await new_pod(network)
    async with tcp_echo_of_peer(other.namespace, (other4, PORT)):
        assert await ask_tcp(one.namespace, (other4, PORT)) == one4
    async with tcp_echo_of_peer(other.namespace, (other6, PORT)):
        assert await ask_tcp(one.namespace, (other6, PORT)) == one6


async def test_pod_and_node_reach_each_other(
    world: World, network: Network, new_pod: PodMaker
) -> None:
    pod, pod4, pod6 = await new_pod(network)
    for address, node, seen in ((pod4, NODE4, "10.88.0.1"), (pod6, NODE6, "fd00:1::1")):
        async with tcp_echo_of_peer(pod.namespace, (address, PORT)):
            assert await ask_tcp(world.node, (address, PORT)) == seen
        async with tcp_echo_of_peer(world.node, (node, PORT)):
            assert await ask_tcp(pod.namespace, (node, PORT)) == address
        async with tcp_echo_of_peer(world.node, (seen, PORT)):
            assert await ask_tcp(pod.namespace, (seen, PORT)) == address


async def test_pod_has_a_loopback(network: Network, new_pod: PodMaker) -> None:
    pod, _, _ = await new_pod(network)
    for address in ("127.0.0.1", "::1"):
        async with tcp_echo_of_peer(pod.namespace, (address, PORT)):
            assert await ask_tcp(pod.namespace, (address, PORT)) == address


@needs_nf_tables
async def test_others_see_the_node_in_place_of_a_pod(
    world: World, network: Network, new_pod: PodMaker
) -> None:
    pod, _, _ = await new_pod(network)
    for neighbour, node in ((NEIGHBOUR4, NODE4), (NEIGHBOUR6, NODE6)):
        for protocol in ("tcp", "udp"):
            async with SERVE[protocol](world.neighbour, (neighbour, PORT)):
                assert await ASK[protocol](pod.namespace, (neighbour, PORT)) == node


@needs_nf_tables
@pytest.mark.usefixtures("netfilter")
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
async def test_host_port_is_reached_from_everywhere(
    protocol: str, version: int, world: World, network: Network, new_pod: PodMaker
) -> None:
    pod, pod4, pod6 = await new_pod(network)
    other, _, _ = await new_pod(network)
    await network.publish(pod.id, [mapping(protocol)])
    if version == 4:
        address, node, neighbour, gateway = pod4, NODE4, NEIGHBOUR4, "10.88.0.1"
    else:
        address, node, neighbour, gateway = pod6, NODE6, NEIGHBOUR6, "fd00:1::1"
    ask = ASK[protocol]
    async with SERVE[protocol](pod.namespace, (address, PORT)):
        assert await ask(world.neighbour, (node, HOST_PORT)) == neighbour
        assert await ask(world.node, (node, HOST_PORT)) == node
        assert await ask(pod.namespace, (node, HOST_PORT)) == gateway
        assert await ask(other.namespace, (node, HOST_PORT)) == gateway
        assert await ask(other.namespace, (gateway, HOST_PORT)) == gateway


@needs_nf_tables
@pytest.mark.usefixtures("netfilter")
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
async def test_host_port_is_reached_by_loopback_of_ipv4(
    protocol: str, world: World, network: Network, new_pod: PodMaker
) -> None:
    pod, pod4, _ = await new_pod(network)
    await network.publish(pod.id, [mapping(protocol)])
    ask = ASK[protocol]
    async with SERVE[protocol](pod.namespace, (pod4, PORT)):
        assert await ask(world.node, ("127.0.0.1", HOST_PORT)) == "10.88.0.1"
    with pytest.raises(ConnectionRefusedError):
        await ask(world.node, ("::1", HOST_PORT))


@needs_nf_tables
async def test_other_ports_are_not_touched(
    world: World, network: Network, new_pod: PodMaker
) -> None:
    pod, pod4, _ = await new_pod(network)
    await network.publish(pod.id, [mapping("tcp")])
    async with tcp_echo_of_peer(pod.namespace, (pod4, PORT)):
        with pytest.raises(ConnectionRefusedError):
            await ask_tcp(world.neighbour, (NODE4, HOST_PORT + 1))
        with pytest.raises(ConnectionRefusedError):
            await ask_udp(world.neighbour, (NODE4, HOST_PORT))
    async with tcp_echo_of_peer(world.neighbour, (NEIGHBOUR4, HOST_PORT)):
        assert await ask_tcp(world.node, (NEIGHBOUR4, HOST_PORT)) == NODE4
        assert await ask_tcp(pod.namespace, (NEIGHBOUR4, HOST_PORT)) == NODE4


@needs_nf_tables
async def test_host_port_of_one_address(world: World, network: Network, new_pod: PodMaker) -> None:
    pod, pod4, _ = await new_pod(network)
    await network.publish(pod.id, [mapping("tcp", NODE4)])
    async with tcp_echo_of_peer(pod.namespace, (pod4, PORT)):
        assert await ask_tcp(world.neighbour, (NODE4, HOST_PORT)) == NEIGHBOUR4
        with pytest.raises(ConnectionRefusedError):
            await ask_tcp(world.node, ("127.0.0.1", HOST_PORT))


@needs_nf_tables
async def test_host_port_of_an_address_that_is_not_the_nodes_takes_nothing_away(
    world: World, network: Network, new_pod: PodMaker
) -> None:
    pod, pod4, _ = await new_pod(network)
    await network.publish(pod.id, [mapping("tcp", NEIGHBOUR4)])
    async with (
        tcp_echo_of_peer(pod.namespace, (pod4, PORT)),
        tcp_echo_of_peer(world.neighbour, (NEIGHBOUR4, HOST_PORT)),
    ):
        assert await ask_tcp(world.node, (NEIGHBOUR4, HOST_PORT)) == NODE4


@needs_nf_tables
async def test_detached_port_is_closed_and_may_be_taken_by_another(
    world: World, network: Network, new_pod: PodMaker
) -> None:
    pod, _, _ = await new_pod(network)
    other, other4, _ = await new_pod(network)
    await network.publish(pod.id, [mapping("tcp")])
    await network.detach(pod.id)
    with pytest.raises(ConnectionRefusedError):
        await ask_tcp(world.neighbour, (NODE4, HOST_PORT))
    await network.publish(other.id, [mapping("tcp")])
    async with tcp_echo_of_peer(other.namespace, (other4, PORT)):
        assert await ask_tcp(world.neighbour, (NODE4, HOST_PORT)) == NEIGHBOUR4


@needs_nf_tables
async def test_pods_do_not_reach_loopback_services_of_the_node(
    world: World, network: Network, new_pod: PodMaker
) -> None:
    pod, _, _ = await new_pod(network)
    for setting in ("all", "eth0"):
        pod.namespace.write(f"net/ipv4/conf/{setting}/route_localnet", "1")
    async with pod.namespace.routing() as ipr:
        await ipr.link("set", index=1, state="down")
        await ipr.route("add", dst="127.0.0.2/32", gateway="10.88.0.1")
    async with udp_echo_of_peer(world.node, ("127.0.0.2", PORT)):
        assert await ask_udp(world.node, ("127.0.0.2", PORT)) == "127.0.0.1"
        with pytest.raises(TimeoutError):
            await ask_udp(pod.namespace, ("127.0.0.2", PORT), REFUSED_SECONDS)


async def test_traffic_is_counted_as_the_pod_sees_it(
    world: World, network: Network, new_pod: PodMaker
) -> None:
    pod, pod4, _ = await new_pod(network)
    idle, _, _ = await new_pod(network)
    before = network.all_interface_stats()[pod.id]
    sender = world.node.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for _ in range(10):
        sender.sendto(bytes(1000), (pod4, PORT))
    sender.close()
    received = before.rx_bytes + 10_000
    await until(lambda: network.all_interface_stats()[pod.id].rx_bytes > received)
    after = network.all_interface_stats()
    assert after.keys() == {pod.id, idle.id}
    assert after[pod.id].name == "eth0"
    assert after[pod.id].rx_packets - before.rx_packets >= 10
    assert after[pod.id].rx_bytes - before.rx_bytes > 10_000
    assert after[pod.id].tx_bytes - before.tx_bytes < 10_000
    assert after[idle.id].rx_bytes < 10_000
