"""What the network makes, keeps and takes away, in the kernel and in the store."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import resource
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nodeagent import check
from nodeagent.config import Config
from nodeagent.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unsupported,
)
from nodeagent.linux import syscalls
from nodeagent.net import links
from nodeagent.net.declared import DeclaredTable
from nodeagent.net.network import Network, NetworkConfig, PortMapping
from nodeagent.net.nftables import Table
from nodeagent.net.ruleset import Ruleset
from nodeagent.records import HostPort, Lease, NodeNetwork
from nodeagent.store import Store
from nodeagent.tasks import Tasks
from tests.kernel.net.conftest import DUAL_STACK, INSTANCE, PodMaker, World
from tests.kernel.net.world import (
    HAS_BRIDGE_TABLES,
    NEIGHBOUR4,
    NODE4,
    Namespace,
    Pod,
    ask_again,
    ask_tcp,
    has_nf_tables,
    needs_bridge_tables,
    needs_nf_tables,
    tcp_echo_of_peer,
    udp_echo_of_peer,
    until,
)

OTHER_INSTANCE = "ffeeddcc"
BRIDGE = f"na{INSTANCE}"
TABLE = f"nodeagent_{INSTANCE}"
CAP_NET_ADMIN = 12
RULESET = Ruleset(table=Table(TABLE), bridge=BRIDGE, subnets=(), masquerade=True, host_ports=True)
WEB = PortMapping(protocol="tcp", container_port=8080, host_port=80)
DNS = PortMapping(protocol="udp", container_port=5353, host_port=53)


def nft_text(*arguments: str, given: str = "") -> str:
    command = ["nft", *arguments]
    return subprocess.run(command, input=given, capture_output=True, text=True, check=True).stdout


def nft(*arguments: str) -> list[dict[str, Any]]:
    listed = json.loads(nft_text("-j", *arguments) or "{}")
    return [entry for entry in listed.get("nftables", []) if "metainfo" not in entry]


def elements(name: str, kind: str = "map") -> list[Any]:
    (listed,) = nft("list", kind, "inet", TABLE, name)
    return list(listed[kind].get("elem", []))


def senders(name: str) -> set[tuple[str, ...]]:
    """What a set of the filter has: port, MAC address, address."""
    (listed,) = nft("list", "set", "bridge", TABLE, name)
    return {tuple(element["concat"]) for element in listed["set"].get("elem", [])}


def lease_of(store: Store, pod: Pod) -> Lease:
    lease = store.get(Lease, pod.id)
    assert lease is not None
    return lease


def links_of_pods(node: Namespace) -> list[str]:
    return [name for name in node.links() if name.startswith("nv")]


# --- the node's side ------------------------------------------------------------------------------------------------


def state_of(node: Namespace) -> tuple[list[str], list[dict[str, Any]], list[str]]:
    settings = (
        "net/ipv4/ip_forward",
        "net/ipv6/conf/all/forwarding",
        "net/ipv6/conf/wan/accept_ra",
    )
    return sorted(node.links()), nft("list", "tables"), [node.read(name) for name in settings]


@needs_nf_tables
async def test_nothing_is_left_when_it_is_removed(world: World, store: Store) -> None:
    before = state_of(world.node)
    network = await Network.start(config=DUAL_STACK, store=store, instance=INSTANCE, tasks=Tasks())
    assert world.node.read("net/ipv4/ip_forward") == "1"
    pod = Pod()
    await network.attach(pod.id, pod.namespace.descriptor, pod.route)
    await network.publish(pod.id, [WEB])
    await network.detach(pod.id)
    await network.close(remove=True)
    pod.close()
    assert state_of(world.node) == before
    assert store.all(Lease) == []
    assert store.all(HostPort) == []


@pytest.mark.parametrize("failing", ["store", "table", "link"])
async def test_an_end_that_fails_in_a_step_removes_all_else(
    world: World,
    store: Store,
    new_pod: PodMaker,
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
) -> None:
    network = await Network.start(config=DUAL_STACK, store=store, instance=INSTANCE, tasks=Tasks())
    await new_pod(network)
    pod, _, _ = await new_pod(network)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        if failing == "store":
            patch.setattr(store, "delete", fail)
        elif failing == "table":
            patch.setattr(DeclaredTable, "delete", fail)
        else:
            link, delete = network._ipam.leases[pod.id].link, links.delete
            patch.setattr(links, "delete", lambda name: fail() if name == link else delete(name))
        with pytest.raises(OSError, match="Input/output"):
            await network.close(remove=True)
    left = {name for name in links.names("n") if INSTANCE in name}
    assert left == ({link} if failing == "link" else set())
    assert (f"table inet {TABLE}" in nft_text("list", "tables")) == (failing == "table")
    again = await Network.start(config=DUAL_STACK, store=store, instance=INSTANCE, tasks=Tasks())
    await again.close(remove=True)


async def test_a_link_is_not_gone_for_want_of_a_descriptor(world: World) -> None:
    """Its address would be leased again while it stands."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    last = os.open("/dev/null", os.O_RDONLY)
    resource.setrlimit(resource.RLIMIT_NOFILE, (last, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            links.exists("lo")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        os.close(last)
    assert links.exists("lo")
    assert not links.exists("absent")


async def test_a_default_route_by_advertisement_survives_forwarding(
    world: World, store: Store
) -> None:
    async with world.node.routing() as ipr:
        await ipr.route("add", dst="default", family=10, gateway="2001:db8::2", proto=9)
    before = state_of(world.node)
    network = await Network.start(config=DUAL_STACK, store=store, instance=INSTANCE, tasks=Tasks())
    assert world.node.read("net/ipv6/conf/wan/accept_ra") == "2"
    await network.close(remove=True)
    assert state_of(world.node) == before


@needs_nf_tables
async def test_table_is_what_nft_shows(network: Network, new_pod: PodMaker) -> None:
    pod, pod4, pod6 = await new_pod(network)
    await network.publish(
        pod.id,
        [
            WEB,
            PortMapping(protocol="sctp", container_port=9, host_port=7, host_ip=NODE4),
            PortMapping(protocol="tcp", container_port=1, host_port=0),
        ],
    )
    assert elements("any4") == [[{"concat": ["tcp", 80]}, {"concat": [pod4, 8080]}]]
    assert elements("any6") == [[{"concat": ["tcp", 80]}, {"concat": [pod6, 8080]}]]
    assert elements("bound4") == [[{"concat": [NODE4, "sctp", 7]}, {"concat": [pod4, 9]}]]
    shown = nft_text("list", "table", "inet", TABLE)
    assert "dnat ip to meta l4proto . th dport map @any4" in shown
    assert f'oifname != "{BRIDGE}" ip saddr 10.88.0.0/16 masquerade' in shown
    assert f'iifname "{BRIDGE}" ip daddr 127.0.0.0/8 drop' in shown
    # What nft lists it accepts as well: no expression is unknown to it or lost in its text.
    nft_text("-c", "-f", "-", given=shown)


@needs_bridge_tables
@pytest.mark.usefixtures("network")
async def test_filter_is_what_nft_shows() -> None:
    shown = nft_text("list", "table", "bridge", TABLE)
    assert f'iifname "nv{INSTANCE}*" goto from_pod' in shown
    assert "iifname . ether saddr . ip saddr @ipv4 accept" in shown
    assert "icmpv6 type nd-neighbor-advert iifname . ether saddr . " in shown


@needs_nf_tables
async def test_what_is_switched_off_goes(
    world: World, store: Store, new_pod: PodMaker, caplog: pytest.LogCaptureFixture
) -> None:
    network = await Network.start(
        config=NetworkConfig(), store=store, instance=INSTANCE, tasks=Tasks()
    )
    pod, _, _ = await new_pod(network)
    await network.publish(pod.id, [WEB])
    await network.close(remove=False)
    config = NetworkConfig(masquerade=False, host_ports=False, spoof_protection=False)
    network = await Network.start(config=config, store=store, instance=INSTANCE, tasks=Tasks())
    shown = json.dumps(nft("list", "ruleset"))
    assert TABLE in shown
    assert "bridge" not in shown
    assert world.node.read(f"net/ipv4/conf/{BRIDGE}/rp_filter") == "0"
    assert "masquerade" not in shown
    assert "any4" not in shown
    assert world.node.read(f"net/ipv4/conf/{BRIDGE}/route_localnet") == "0"
    assert network.status().problems == ()
    await network.detach(pod.id)
    await network.close(remove=True)
    assert caplog.messages == []


@needs_nf_tables
@pytest.mark.parametrize(
    ("masquerade", "host_ports"), [(True, False), (False, True), (False, False)]
)
async def test_what_is_off_is_not_made(
    masquerade: bool, host_ports: bool, world: World, store: Store, new_pod: PodMaker
) -> None:
    config = NetworkConfig(masquerade=masquerade, host_ports=host_ports)
    network = await Network.start(config=config, store=store, instance=INSTANCE, tasks=Tasks())
    pod, pod4, _ = await new_pod(network)
    shown = json.dumps(nft("list", "table", "inet", TABLE))
    assert ('"masquerade"' in shown) is (masquerade or host_ports)
    assert ('"!="' in shown) is masquerade
    assert ("any4" in shown) is host_ports
    assert world.node.read(f"net/ipv4/conf/{BRIDGE}/route_localnet") == str(int(host_ports))
    if not host_ports:
        with pytest.raises(FailedPrecondition, match="host_ports"):
            await network.publish(pod.id, [WEB])
    async with tcp_echo_of_peer(world.node, ("10.88.0.1", 80)):
        assert await ask_tcp(pod.namespace, ("10.88.0.1", 80)) == pod4
    await network.close(remove=True)


@pytest.mark.parametrize("verb", ["set", "del"])
async def test_a_bridge_that_is_down_or_gone_is_told_and_made_good(
    world: World, network: Network, new_pod: PodMaker, verb: str
) -> None:
    assert network.status().ready
    pod, pod4, _ = await new_pod(network)
    async with world.node.routing() as ipr:
        await ipr.link(verb, index=world.node.links()[BRIDGE], state="down")
    status = network.status()
    assert (status.ready, status.reason) == (False, "BridgeDown")
    assert BRIDGE in status.message
    await until(lambda: network.status().ready)
    other, _, other6 = await new_pod(network)
    async with (
        tcp_echo_of_peer(pod.namespace, (pod4, 80)),
        tcp_echo_of_peer(other.namespace, (other6, 80)),
    ):
        assert await ask_tcp(other.namespace, (pod4, 80))
        assert await ask_tcp(pod.namespace, (other6, 80))


async def test_a_bridge_that_cannot_be_made_is_tried_again_and_told_once(
    world: World,
    network: Network,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("nodeagent.net.network._RETRY_SECONDS", 0.05)
    async with world.node.routing() as ipr:
        await ipr.link("del", index=world.node.links()[BRIDGE])
        await ipr.link("add", ifname=BRIDGE, kind="veth", peer="nowhere")
        for _ in range(20):
            assert not network.status().ready
            await asyncio.sleep(0.01)
        await ipr.link("del", index=world.node.links()[BRIDGE])
    await until(lambda: network.status().ready)
    assert len(caplog.messages) == len(set(caplog.messages))


@needs_nf_tables
async def test_status_makes_good_what_others_undid(
    world: World, network: Network, new_pod: PodMaker
) -> None:
    pod, _, _ = await new_pod(network)
    await network.publish(pod.id, [WEB])
    nft("flush", "ruleset")
    for name, value in (
        ("net/ipv4/ip_forward", "0"),
        (f"net/ipv6/conf/{BRIDGE}/accept_ra", "2"),
        (f"net/ipv4/conf/{BRIDGE}/rp_filter", "0"),
    ):
        world.node.write(name, value)
    assert network.status().ready
    assert len(elements("any4")) == len(senders("ipv4")) == 1
    assert world.node.read("net/ipv4/ip_forward") == "1"
    assert world.node.read(f"net/ipv6/conf/{BRIDGE}/accept_ra") == "0"
    assert world.node.read(f"net/ipv4/conf/{BRIDGE}/rp_filter") == "1"


@needs_nf_tables
async def test_ports_survive_that_somebody_flushed_the_table(
    network: Network, new_pod: PodMaker
) -> None:
    one, _, _ = await new_pod(network)
    other, _, _ = await new_pod(network)
    await network.publish(one.id, [WEB])
    nft("flush", "ruleset")
    await network.publish(other.id, [DNS])
    assert len(elements("any4")) == 2
    nft("flush", "ruleset")
    await network.detach(one.id)
    assert len(elements("any4")) == 1


# --- elements that nothing explains -----------------------------------------------------------------------------------

MAC = "02:00:00:00:00:01"
STRAY_ELEMENTS = {
    "any4": ("tcp . 81", "10.88.0.99 . 8080"),
    "bound4": ("192.0.2.1 . udp . 82", "10.88.0.99 . 8080"),
    "any6": ("sctp . 83", "fd00:1::99 . 8080"),
}
STRAY_SENDERS = {
    "ipv4": f'"nv{INSTANCE}zzzzz" . {MAC} . 10.88.0.99',
    "ipv6": f'"nv{INSTANCE}zzzzz" . {MAC} . fd00:1::99',
}


@needs_nf_tables
async def test_elements_that_nothing_explains_are_named_and_removed(
    network: Network, new_pod: PodMaker
) -> None:
    pod, _, _ = await new_pod(network)
    await network.publish(pod.id, [WEB, DNS])
    assert await network.strays() == set()
    for name, (key, data) in STRAY_ELEMENTS.items():
        nft("add", "element", "inet", TABLE, name, f"{{ {key} : {data} }}")
    nft("add", "element", "inet", TABLE, "node4", "{ 192.0.2.7 }")  # as the rules themselves do
    names = {f"{name} {{ {key} : {data} }}" for name, (key, data) in STRAY_ELEMENTS.items()}
    assert await network.strays() == names
    for name in names:
        assert await network.remove_stray(name)
        assert not await network.remove_stray(name)
    assert await network.strays() == set()
    assert len(elements("any4")) == len(elements("any6")) == 2
    assert elements("bound4") == []
    assert elements("node4", "set") == ["192.0.2.7"]


@needs_bridge_tables
async def test_senders_that_nothing_explains_are_named_and_removed(
    network: Network, new_pod: PodMaker
) -> None:
    await new_pod(network)
    held = senders("ipv4"), senders("ipv6")
    for name, key in STRAY_SENDERS.items():
        nft("add", "element", "bridge", TABLE, name, f"{{ {key} }}")
    names = {f"{name} {{ {key} }}".replace('"', "") for name, key in STRAY_SENDERS.items()}
    assert await network.strays() == names
    for name in names:
        assert await network.remove_stray(name)
    assert await network.strays() == set()
    assert (senders("ipv4"), senders("ipv6")) == held


@needs_nf_tables
async def test_tables_of_others_have_no_strays(network: Network) -> None:
    """Whatever is in them, and however much they look like the agent's."""
    for family, table in (("inet", f"nodeagent_{OTHER_INSTANCE}"), ("ip", TABLE)):
        nft("add", "table", family, table)
        nft("add", "set", family, table, "any4", "{ type inet_service; }")
        nft("add", "element", family, table, "any4", "{ 81 }")
    assert await network.strays() == set()
    assert not await network.remove_stray("any4 { 81 }")


@needs_nf_tables
async def test_an_element_that_gets_a_record_meanwhile_is_no_stray(
    network: Network, new_pod: PodMaker
) -> None:
    """It was found twice while it was just being withdrawn, say, and is then published again."""
    pod, pod4, _ = await new_pod(network)
    nft("add", "element", "inet", TABLE, "any4", f"{{ tcp . 80 : {pod4} . 8080 }}")
    (name,) = await network.strays()
    await network.publish(pod.id, [WEB])
    assert not await network.remove_stray(name)
    assert len(elements("any4")) == 1


@needs_bridge_tables
async def test_the_senders_of_a_released_lease_are_explained_until_its_link_has_gone(
    network: Network,
) -> None:
    pod = Pod()
    await network.attach(pod.id, pod.namespace.descriptor, pod.route)
    before = senders("ipv4")
    await network.detach(pod.id)
    assert await network.strays() == set()
    pod.close()
    await until(lambda: not senders("ipv4") & before)
    assert await network.strays() == set()


@needs_nf_tables
async def test_many_elements_are_all_listed(network: Network) -> None:
    """An answer of the kernel has a few hundred."""
    ports = range(1, 3001)
    given = ",".join(f"tcp . {port} : 10.88.0.99 . 80" for port in ports)
    nft_text("-f", "-", given=f"add element inet {TABLE} any4 {{ {given} }}")
    assert await network.strays() == {f"any4 {{ tcp . {p} : 10.88.0.99 . 80 }}" for p in ports}


@needs_nf_tables
async def test_a_table_that_is_gone_has_no_strays_and_one_that_is_not_listed_is_an_error(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    nft("flush", "ruleset")
    assert await network.strays() == set()

    def no_descriptor() -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("nodeagent.net.nftables.connect", no_descriptor)
    with pytest.raises(OSError, match="Too many open files"):
        await network.strays()


@needs_nf_tables
@pytest.mark.parametrize("then", ["detach", "status", "publish"])
async def test_an_element_that_could_not_be_removed_goes_with_what_is_done_next(
    network: Network, new_pod: PodMaker, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    """Its record has gone by then, so that nothing else would know of it."""
    pod, _, _ = await new_pod(network)
    other, other4, _ = await new_pod(network)
    await network.publish(pod.id, [WEB])

    def fail(*_: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with monkeypatch.context() as patched:
        patched.setattr("nodeagent.net.nftables.transact", fail)
        with pytest.raises(OSError, match="Cannot allocate memory"):
            await network.detach(pod.id)
    assert len(elements("any4")) == 1
    if then == "detach":
        await network.detach(pod.id)
    elif then == "status":
        assert network.status().problems == ()
    else:
        await network.publish(other.id, [DNS])
    assert [data["concat"][0] for _, data in elements("any4")] == [other4] * (then == "publish")
    assert await network.strays() == set()


@needs_nf_tables
async def test_ports_of_a_pod_are_not_forwarded_although_their_record_stays(
    world: World, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next attempt may come when its lease, which names the elements, has gone."""
    network = await Network.start(config=DUAL_STACK, store=store, instance=INSTANCE, tasks=Tasks())
    pod = Pod()
    await network.attach(pod.id, pod.namespace.descriptor, pod.route)
    await network.publish(pod.id, [WEB])

    def full(*_: object) -> None:
        raise ResourceExhausted("state.db: database or disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(network._host_ports, "release", full)
        with pytest.raises(ResourceExhausted):
            await network.detach(pod.id)
    assert elements("any4") == []
    assert network.holders == {pod.id}
    pod.close()
    await until(lambda: store.get(Lease, pod.id) is None)
    await network.detach(pod.id)
    assert network.holders == await network.strays() == set()
    await network.close(remove=True)


@needs_bridge_tables
async def test_pods_may_send_although_somebody_flushed_the_filter(
    network: Network, new_pod: PodMaker
) -> None:
    await new_pod(network)
    nft("flush", "ruleset")
    pod, pod4, _ = await new_pod(network)
    assert len(senders("ipv4")) == 2
    async with tcp_echo_of_peer(pod.namespace, (pod4, 80)):
        assert await ask_tcp(pod.namespace, (pod4, 80)) == pod4


async def test_a_link_of_somebody_else_is_not_taken(world: World, store: Store) -> None:
    async with world.node.routing() as ipr:
        await ipr.link("add", ifname="br0", kind="bridge")
    for name in ("br0", "wan"):
        with pytest.raises(AlreadyExists, match=name):
            await Network.start(
                config=NetworkConfig(bridge=name), store=store, instance=INSTANCE, tasks=Tasks()
            )
    assert world.node.links().keys() >= {"br0", "wan"}


@pytest.mark.skipif(has_nf_tables(), reason="this kernel has nf_tables")
async def test_without_nf_tables_it_says_what_is_missing(
    world: World, network: Network, new_pod: PodMaker
) -> None:
    status = network.status()
    assert status.ready
    ports, masquerade, *others = status.problems
    assert ports.startswith("no host ports: nf_tables")
    assert masquerade.startswith("no masquerade: nf_tables")
    assert [problem.partition(": ")[0] for problem in others] == (
        [] if HAS_BRIDGE_TABLES else ["no protection against spoofing by pods"]
    )
    pod, pod4, _ = await new_pod(network)
    with pytest.raises(Unsupported, match="host ports: nf_tables"):
        await network.publish(pod.id, [WEB])
    await network.publish(pod.id, [])
    async with tcp_echo_of_peer(world.node, ("10.88.0.1", 80)):
        assert await ask_tcp(pod.namespace, ("10.88.0.1", 80)) == pod4
    # Without the table nothing would keep pods from services on the node's loopback addresses.
    assert world.node.read(f"net/ipv4/conf/{BRIDGE}/route_localnet") == "0"


@pytest.mark.usefixtures("world")
async def test_check_tells_what_this_kernel_takes() -> None:
    present = {feature.name: feature.present for feature in await check.features(Config())}
    assert present["nf_tables"] == has_nf_tables()
    assert present["nf_tables on bridges"] == HAS_BRIDGE_TABLES
    assert nft("list", "tables") == []


@needs_nf_tables
async def test_without_permission_it_says_so(world: World) -> None:
    """An agent in a container may lack it, even where its kernel has nf_tables."""
    with world.node.entered():
        effective, permitted, inheritable = syscalls.capget()
        syscalls.capset(effective & ~(1 << CAP_NET_ADMIN), permitted, inheritable)
        try:
            with pytest.raises(Unsupported, match="not permitted"):
                DeclaredTable.open(RULESET, list)
        finally:
            syscalls.capset(effective, permitted, inheritable)


# --- several agents -------------------------------------------------------------------------------------------------


@needs_nf_tables
async def test_agents_side_by_side_do_not_meet(
    world: World, tmp_path: Path, new_pod: PodMaker
) -> None:
    before = state_of(world.node)
    stores = [Store.open(tmp_path / f"{name}.db") for name in ("one", "two")]
    # At once, so that both find the default subnet free.
    one, two = await asyncio.gather(
        *(
            Network.start(config=NetworkConfig(), store=store, instance=instance, tasks=Tasks())
            for store, instance in zip(stores, (INSTANCE, OTHER_INSTANCE), strict=True)
        )
    )
    first, first4, _ = await new_pod(one)
    second, _, _ = await new_pod(two)
    await one.publish(first.id, [WEB])
    async with tcp_echo_of_peer(first.namespace, (first4, 8080)):
        assert await ask_tcp(world.neighbour, (NODE4, 80)) == NEIGHBOUR4
        assert await ask_tcp(second.namespace, (NODE4, 80)) == first4[:-1] + "1"
    await one.close(remove=True)
    async with tcp_echo_of_peer(world.neighbour, (NEIGHBOUR4, 80)):
        assert await ask_tcp(second.namespace, (NEIGHBOUR4, 80)) == NODE4
    await two.close(remove=True)
    assert state_of(world.node) == before
    for store in stores:
        store.close()


async def test_default_subnet_gives_way_and_stays_where_it_is(
    world: World, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "nodeagent.net.network")
    async with world.node.routing() as ipr:
        await ipr.route("add", dst="10.88.7.0/24", gateway=NEIGHBOUR4)
    chosen = set()
    for verb in ("del", "add"):
        network = await Network.start(
            config=NetworkConfig(), store=store, instance=INSTANCE, tasks=Tasks()
        )
        pod = Pod()
        lease = await network.attach(pod.id, pod.namespace.descriptor, pod.route)
        chosen.add(lease.addresses[0].rpartition(".")[0])
        assert not any("overlap" in problem for problem in network.status().problems)
        await network.close(remove=True)
        pod.close()
        async with world.node.routing() as ipr:
            await ipr.route(verb, dst="10.88.7.0/24", gateway=NEIGHBOUR4)
    assert len(chosen) == 1
    assert "10.88." not in chosen.pop()
    first, second = (
        r.message for r in caplog.records if r.message.startswith("pods get addresses")
    )
    assert (
        "default 10.88.0.0/16, which overlaps the node's route to 10.88.7.0/24; network.subnet4"
        in first
    )
    assert "default 10.88.0.0/16, which overlapped a route when they were chosen" in second


@needs_nf_tables
async def test_a_host_port_that_a_process_of_the_node_has_is_taken_and_told(
    world: World, network: Network, new_pod: PodMaker, caplog: pytest.LogCaptureFixture
) -> None:
    pod, pod4, _ = await new_pod(network)
    free = PortMapping(protocol="tcp", container_port=8080, host_port=81)
    async with (
        tcp_echo_of_peer(world.node, ("127.0.0.1", 80)),
        udp_echo_of_peer(world.node, (NODE4, 53)),
        tcp_echo_of_peer(pod.namespace, (pod4, 8080)),
    ):
        await network.publish(pod.id, [WEB, DNS, free])
        await until(lambda: len(caplog.messages) == 2)
        # The pod is who answers.
        assert await ask_tcp(world.neighbour, (NODE4, 80)) == NEIGHBOUR4
    assert sorted(caplog.messages) == [
        f'pod "{pod.id}": host port {port}: a process of the node listens on {where}; what comes to it goes to the '
        "pod instead"
        for port, where in (("tcp 80", "127.0.0.1:80"), ("udp 53", f"{NODE4}:53"))
    ]


async def test_configured_subnet_is_kept_but_its_overlap_told(world: World, store: Store) -> None:
    config = NetworkConfig(subnet4="198.51.100.128/25")
    network = await Network.start(config=config, store=store, instance=INSTANCE, tasks=Tasks())
    problem = network.status().problems[0]
    assert "198.51.100.128/25" in problem
    assert "198.51.100.0/24" in problem
    assert await Network.overlaps(config=config, store=store, instance=INSTANCE) == [problem]
    await network.close(remove=True)
    assert await Network.overlaps(config=config, store=store, instance=INSTANCE) == [problem]


async def test_the_default_subnet_would_give_way(world: World, store: Store) -> None:
    """What a start would settle by itself is no problem, and nothing is made to find that out."""
    async with world.node.routing() as ipr:
        await ipr.route("add", dst="10.88.7.0/24", gateway=NEIGHBOUR4)
    config = NetworkConfig()
    assert await Network.overlaps(config=config, store=store, instance=INSTANCE) == []
    assert BRIDGE not in world.node.links()
    assert store.get(NodeNetwork, "node") is None
    async with world.node.routing() as ipr:
        await ipr.route("del", dst="10.88.7.0/24", gateway=NEIGHBOUR4)


# --- pods -----------------------------------------------------------------------------------------------------------


async def test_eth0_of_a_pod(network: Network, new_pod: PodMaker) -> None:
    pod, pod4, pod6 = await new_pod(network)
    assert pod.namespace.links().keys() == {"lo", "eth0"}
    async with pod.namespace.routing() as ipr:
        (link,) = [link async for link in await ipr.get_links(ifname="eth0")]
        addresses = {
            (a.get("address"), a["prefixlen"], a.get("IFA_FLAGS") & 0x40)
            async for a in await ipr.get_addr(index=link["index"])
        }
        gateways = {r.get("gateway") async for r in await ipr.get_default_routes()}
        gateways |= {r.get("gateway") async for r in await ipr.get_default_routes(family=10)}
    assert link["state"] == "up"
    assert link.get("mtu") == 1500
    assert {address for address, *_ in addresses} >= {pod4, pod6}
    assert not any(tentative for *_, tentative in addresses)
    assert gateways == {"10.88.0.1", "fd00:1::1"}


@pytest.mark.skipif(not Path("/proc/sys/net/ipv6").exists(), reason="this kernel has no IPv6")
@pytest.mark.parametrize(
    ("config", "disabled"), [(NetworkConfig(), "1"), (DUAL_STACK, "0")], ids=["ipv4", "dual"]
)
async def test_the_node_takes_nothing_from_pods_to_set_itself_up(
    world: World, store: Store, new_pod: PodMaker, config: NetworkConfig, disabled: str
) -> None:
    network = await Network.start(config=config, store=store, instance=INSTANCE, tasks=Tasks())
    pod, _, _ = await new_pod(network)
    conf6 = f"net/ipv6/conf/{BRIDGE}"
    for name in ("accept_ra", "autoconf", "accept_redirects"):
        assert world.node.read(f"{conf6}/{name}") == "0"
    for name in ("accept_redirects", "send_redirects", "accept_source_route"):
        assert world.node.read(f"net/ipv4/conf/{BRIDGE}/{name}") == "0"
    assert world.node.read(f"{conf6}/disable_ipv6") == disabled
    port = lease_of(store, pod).link
    assert world.node.read(f"net/ipv6/conf/{port}/disable_ipv6") == "1"
    assert world.node.read(f"net/ipv6/conf/{port}/accept_ra") == "0"
    assert world.node.read(f"net/ipv4/conf/{port}/rp_filter") == "1"
    await network.close(remove=True)


async def test_ipv6_may_be_added_to_and_taken_from_a_bridge(
    world: World, store: Store, new_pod: PodMaker
) -> None:
    configs = (NetworkConfig(), DUAL_STACK, NetworkConfig())
    pods: list[tuple[Pod, str, str]] = []
    for config in configs:
        network = await Network.start(config=config, store=store, instance=INSTANCE, tasks=Tasks())
        await network.recover([pod.id for pod, *_ in pods])
        pods.append(await new_pod(network))
        await network.close(remove=False)
    # A pod that was given IPv6 keeps it.
    network = await Network.start(
        config=NetworkConfig(), store=store, instance=INSTANCE, tasks=Tasks()
    )
    dual, _, dual6 = pods[1]
    async with tcp_echo_of_peer(dual.namespace, (dual6, 80)):
        assert await ask_tcp(world.node, (dual6, 80)) == "fd00:1::1"
    await network.close(remove=True)


@needs_bridge_tables
async def test_a_pod_may_send_from_its_addresses_until_its_link_is_gone(
    store: Store, network: Network, new_pod: PodMaker
) -> None:
    kept, kept4, _ = await new_pod(network)
    pod, pod4, pod6 = await new_pod(network)
    mac = "0a:6e:0a:58:00:03"
    link = lease_of(store, pod).link
    assert (link, mac, pod4) in senders("ipv4")
    assert senders("ipv6") >= {(link, mac, pod6), (link, mac, "fe80::86e:aff:fe58:3")}
    await network.detach(pod.id)
    await until(lambda: store.get(Lease, pod.id) is None)
    assert {address for *_, address in senders("ipv4")} == {kept4}
    assert {name for name, *_ in senders("ipv6")} == {lease_of(store, kept).link}


async def test_mtu_is_that_of_the_default_route(world: World, store: Store) -> None:
    async with world.node.routing() as ipr:
        await ipr.link("set", index=world.node.links()["wan"], mtu=1400)
    network = await Network.start(
        config=NetworkConfig(), store=store, instance=INSTANCE, tasks=Tasks()
    )
    pod = Pod()
    await network.attach(pod.id, pod.namespace.descriptor, pod.route)
    async with pod.namespace.routing() as ipr:
        (link,) = [link async for link in await ipr.get_links(ifname="eth0")]
    assert link.get("mtu") == 1400
    await network.close(remove=True)
    pod.close()


async def test_attach_again_gives_the_same_lease(network: Network) -> None:
    pod = Pod()
    first = await network.attach(pod.id, pod.namespace.descriptor, pod.route)
    assert await network.attach(pod.id, pod.namespace.descriptor, pod.route) == first
    pod.close()


async def test_attach_after_detach_is_a_new_one(network: Network) -> None:
    pod = Pod()
    first = await network.attach(pod.id, pod.namespace.descriptor, pod.route)
    await network.detach(pod.id)
    second = await network.attach(pod.id, pod.namespace.descriptor, pod.route)
    assert set(second.addresses).isdisjoint(first.addresses)
    pod.close()


async def test_failed_attach_leaves_nothing(world: World, store: Store, network: Network) -> None:
    pod, elsewhere = Pod(), Pod()
    with pytest.raises(OSError, match=r"eth0"):
        # The socket of another namespace, where there is no eth0.
        await network.attach(pod.id, pod.namespace.descriptor, elsewhere.route)
    with pytest.raises(NotFound):
        await network.publish(pod.id, [WEB])
    await until(lambda: not store.all(Lease))
    assert links_of_pods(world.node) == []
    pod.close()
    elsewhere.close()


async def test_cancelled_attach_leaves_nothing(
    world: World, store: Store, network: Network
) -> None:
    pod = Pod()
    task = asyncio.create_task(network.attach(pod.id, pod.namespace.descriptor, pod.route))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    pod.close()
    await until(lambda: not store.all(Lease))
    assert links_of_pods(world.node) == []


async def test_many_attach_at_once(world: World, network: Network) -> None:
    pods = [Pod() for _ in range(20)]
    leases = await asyncio.gather(
        *(network.attach(pod.id, pod.namespace.descriptor, pod.route) for pod in pods)
    )
    assert len({address for lease in leases for address in lease.addresses}) == 40
    assert sorted(links_of_pods(world.node)) == sorted(lease.link for lease in leases)
    for pod in pods:
        pod.close()


async def test_full_subnet_names_itself_and_recovers(world: World, store: Store) -> None:
    config = NetworkConfig(subnet4="10.99.0.0/30")
    network = await Network.start(config=config, store=store, instance=INSTANCE, tasks=Tasks())
    one, two = Pod(), Pod()
    await network.attach(one.id, one.namespace.descriptor, one.route)
    with pytest.raises(ResourceExhausted, match=r"10\.99\.0\.0/30"):
        await network.attach(two.id, two.namespace.descriptor, two.route)
    await network.detach(one.id)
    with pytest.raises(ResourceExhausted):
        await network.attach(two.id, two.namespace.descriptor, two.route)
    one.close()
    await until(lambda: not links_of_pods(world.node))
    await until(lambda: not store.all(Lease))
    await network.attach(two.id, two.namespace.descriptor, two.route)
    await network.close(remove=True)
    two.close()


async def test_link_that_outlives_its_pod_is_deleted(
    world: World, store: Store, network: Network, new_pod: PodMaker
) -> None:
    pod, _, _ = await new_pod(network)
    await network.detach(pod.id)
    assert len(links_of_pods(world.node)) == 1
    await until(lambda: not links_of_pods(world.node))
    await until(lambda: not store.all(Lease))


@needs_nf_tables
async def test_detach_is_idempotent(network: Network, new_pod: PodMaker) -> None:
    pod, _, _ = await new_pod(network)
    await network.publish(pod.id, [WEB])
    for _ in range(2):
        await network.detach(pod.id)
    await network.detach("unknown")
    assert elements("any4") == []


# --- host ports -----------------------------------------------------------------------------------------------------


@needs_nf_tables
async def test_a_port_that_is_held_is_refused(network: Network, new_pod: PodMaker) -> None:
    holder, _, _ = await new_pod(network)
    other, _, _ = await new_pod(network)
    await network.publish(holder.id, [WEB])
    with pytest.raises(AlreadyExists, match=f'tcp 80.*"{holder.id}"'):
        await network.publish(other.id, [DNS, WEB])
    assert len(elements("any4")) == 1


@needs_nf_tables
async def test_publish_replaces_what_the_pod_had(network: Network, new_pod: PodMaker) -> None:
    pod, _, _ = await new_pod(network)
    for mappings, count in (([WEB], 1), ([WEB, DNS], 2), ([DNS], 1), ([DNS], 1)):
        await network.publish(pod.id, mappings)
        assert len(elements("any4")) == count
    await network.detach(pod.id)
    assert elements("any4") == []


@needs_nf_tables
async def test_two_addresses_of_the_node_lead_to_one_port(
    network: Network, new_pod: PodMaker
) -> None:
    pod, _, _ = await new_pod(network)
    bound = [
        PortMapping(protocol="tcp", container_port=8080, host_port=80, host_ip=address)
        for address in (NODE4, "127.0.0.1")
    ]
    await network.publish(pod.id, bound)
    assert len(elements("bound4")) == 2
    await network.detach(pod.id)
    assert elements("bound4") == []


async def answered(client: socket.socket) -> bool:
    try:
        return await ask_again(client, (NODE4, DNS.host_port), 0.1) == NEIGHBOUR4
    except (TimeoutError, ConnectionRefusedError):
        return False


@needs_nf_tables
async def test_udp_client_that_never_pauses_follows_the_port(
    world: World, network: Network, new_pod: PodMaker
) -> None:
    client = world.neighbour.socket(2, 2)
    client.bind(("", 4444))
    # Dropped by the node rather than refused, the first packets leave a flow that nothing translates.
    nft("add", "table", "inet", "quiet")
    nft("add", "chain", "inet", "quiet", "output", "{ type filter hook output priority 0; }")
    nft("add", "rule", "inet", "quiet", "output", "meta", "l4proto", "icmp", "drop")
    assert not await answered(client)
    for _ in range(2):
        pod, pod4, _ = await new_pod(network)
        await network.publish(pod.id, [DNS])
        async with udp_echo_of_peer(pod.namespace, (pod4, DNS.container_port)):
            async with asyncio.timeout(60):
                while not await answered(client):
                    pass
        await network.detach(pod.id)
        pod.route.close()
    client.close()


# --- restart and recovery -------------------------------------------------------------------------------------------


@needs_nf_tables
async def test_next_agent_takes_over(world: World, store: Store, new_pod: PodMaker) -> None:
    first = await Network.start(config=DUAL_STACK, store=store, instance=INSTANCE, tasks=Tasks())
    pod, pod4, _ = await new_pod(first)
    await first.publish(pod.id, [WEB])
    await first.close(remove=False)
    second = await Network.start(config=DUAL_STACK, store=store, instance=INSTANCE, tasks=Tasks())
    await second.recover([pod.id])
    assert second.status().ready
    assert second.status().problems == ()
    async with tcp_echo_of_peer(pod.namespace, (pod4, 8080)):
        assert await ask_tcp(world.neighbour, (NODE4, 80)) == NEIGHBOUR4
    other, other4, _ = await new_pod(second)
    assert other4 != pod4
    with pytest.raises(AlreadyExists):
        await second.publish(other.id, [WEB])
    assert second.all_interface_stats().keys() == {pod.id, other.id}
    await second.close(remove=True)


@needs_nf_tables
async def test_recovery_drops_what_belongs_to_no_pod(
    world: World, store: Store, new_pod: PodMaker
) -> None:
    first = await Network.start(config=DUAL_STACK, store=store, instance=INSTANCE, tasks=Tasks())
    kept, _, _ = await new_pod(first)
    lost, _, _ = await new_pod(first)
    await first.publish(kept.id, [WEB])
    await first.publish(lost.id, [DNS])
    async with world.node.routing() as ipr:
        await ipr.link("add", ifname=f"nv{INSTANCE}stray"[:15], kind="veth", peer="nowhere")
    await first.close(remove=False)
    second = await Network.start(config=DUAL_STACK, store=store, instance=INSTANCE, tasks=Tasks())
    await second.recover({kept.id})
    assert [port.pod_id for port in store.all(HostPort)] == [kept.id]
    assert len(elements("any4")) == len(senders("ipv4")) == 1
    await until(lambda: len(links_of_pods(world.node)) == 1)
    await until(lambda: [lease.pod_id for lease in store.all(Lease)] == [kept.id])
    await second.close(remove=True)


@needs_nf_tables
async def test_recovery_forgets_flows_to_pods_that_are_gone(
    world: World, store: Store, new_pod: PodMaker
) -> None:
    client = world.neighbour.socket(2, 2)
    client.bind(("", 4444))
    for _ in range(2):
        network = await Network.start(
            config=DUAL_STACK, store=store, instance=INSTANCE, tasks=Tasks()
        )
        await network.recover([])
        pod, pod4, _ = await new_pod(network)
        await network.publish(pod.id, [DNS])
        async with udp_echo_of_peer(pod.namespace, (pod4, DNS.container_port)):
            async with asyncio.timeout(60):
                while not await answered(client):
                    pass
        await network.close(remove=False)
    client.close()
    network = await Network.start(config=DUAL_STACK, store=store, instance=INSTANCE, tasks=Tasks())
    await network.close(remove=True)


async def test_recovery_plugs_pods_into_a_new_bridge(
    world: World, store: Store, new_pod: PodMaker
) -> None:
    first = await Network.start(config=DUAL_STACK, store=store, instance=INSTANCE, tasks=Tasks())
    pod, pod4, _ = await new_pod(first)
    await first.close(remove=False)
    async with world.node.routing() as ipr:
        await ipr.link("del", index=world.node.links()[BRIDGE])
    second = await Network.start(config=DUAL_STACK, store=store, instance=INSTANCE, tasks=Tasks())
    await second.recover([pod.id])
    async with tcp_echo_of_peer(pod.namespace, (pod4, 8080)):
        assert await ask_tcp(world.node, (pod4, 8080)) == "10.88.0.1"
    await second.close(remove=True)


@needs_nf_tables
async def test_recovery_after_a_reboot(store: Store, world: World, new_pod: PodMaker) -> None:
    """The store is there, everything in the kernel is gone."""
    first = await Network.start(config=DUAL_STACK, store=store, instance=INSTANCE, tasks=Tasks())
    pod, _, _ = await new_pod(first)
    await first.publish(pod.id, [WEB])
    await first.close(remove=False)
    nft("flush", "ruleset")
    async with world.node.routing() as ipr:
        for name in (BRIDGE, *links_of_pods(world.node)):
            await ipr.link("del", index=world.node.links()[name])
    second = await Network.start(config=DUAL_STACK, store=store, instance=INSTANCE, tasks=Tasks())
    await second.recover([])
    assert store.all(HostPort) == []
    assert elements("any4") == []
    await until(lambda: not store.all(Lease))
    await second.close(remove=True)


# --- pod CIDR -------------------------------------------------------------------------------------------------------


@needs_nf_tables
async def test_new_pods_follow_the_pod_cidr(world: World, store: Store, new_pod: PodMaker) -> None:
    network = await Network.start(
        config=NetworkConfig(), store=store, instance=INSTANCE, tasks=Tasks()
    )
    old, old4, _ = await new_pod(network)
    await network.set_pod_cidr("10.7.0.0/24,fd00:7::/64")
    new, new4, new6 = await new_pod(network)
    assert (new4, new6) == ("10.7.0.2", "")
    async with tcp_echo_of_peer(new.namespace, (new4, 80)):
        assert await ask_tcp(old.namespace, (new4, 80)) == old4
    async with tcp_echo_of_peer(world.neighbour, (NEIGHBOUR4, 80)):
        assert await ask_tcp(old.namespace, (NEIGHBOUR4, 80)) == NODE4
        assert await ask_tcp(new.namespace, (NEIGHBOUR4, 80)) == NODE4
    await network.publish(new.id, [WEB])
    async with tcp_echo_of_peer(new.namespace, (new4, 8080)):
        assert await ask_tcp(new.namespace, (NODE4, 80)) == "10.7.0.1"
    await network.close(remove=False)
    network = await Network.start(
        config=NetworkConfig(), store=store, instance=INSTANCE, tasks=Tasks()
    )
    await network.recover([new.id])
    _, third4, _ = await new_pod(network)
    assert third4 == "10.7.0.3"
    await network.close(remove=True)


@pytest.mark.parametrize(
    "cidr", ["10.7.0.0", "10.7.0.1/24", "x", "10.7.0.0/24,10.8.0.0/24", "10.7.0.0/31"]
)
async def test_malformed_pod_cidr_changes_nothing(
    cidr: str, network: Network, new_pod: PodMaker
) -> None:
    with pytest.raises(InvalidArgument, match="pod_cidr"):
        await network.set_pod_cidr(cidr)
    await network.set_pod_cidr("")
    _, pod4, _ = await new_pod(network)
    assert pod4.startswith("10.88.")


async def test_pod_cidr_within_the_earlier_subnet_gives_no_address_twice(
    world: World, store: Store, new_pod: PodMaker
) -> None:
    network = await Network.start(
        config=NetworkConfig(), store=store, instance=INSTANCE, tasks=Tasks()
    )
    addresses = {(await new_pod(network))[1] for _ in range(3)}
    await network.set_pod_cidr("10.88.0.0/29")
    pod, pod4, _ = await new_pod(network)
    assert pod4 not in addresses
    async with tcp_echo_of_peer(pod.namespace, (pod4, 80)):
        assert await ask_tcp(world.node, (pod4, 80)) == "10.88.0.1"
    with pytest.raises(FailedPrecondition, match=r"has 10\.88\.0\.5"):
        await network.set_pod_cidr("10.88.0.4/30")
    await network.close(remove=True)
