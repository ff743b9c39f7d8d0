from collections.abc import Iterator
from contextlib import ExitStack, closing
from ipaddress import ip_interface, ip_network
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from nodeagent.errors import ResourceExhausted
from nodeagent.net.addresses import Subnet, gateway
from nodeagent.net.ipam import Ipam, Pool, interfaces
from nodeagent.records import Lease
from nodeagent.store import Store

V4, V6 = ip_network("10.1.0.0/24"), ip_network("fd00::/64")
PREFIX = "nv0a1b2c3d"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(tmp_path / "state.db")
    yield opened
    opened.close()


def test_a_lease_is_given_up_although_the_store_fails(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody gives it up again: its pod could not be made."""
    ipam = Ipam(store, PREFIX, (V4,))
    ipam.acquire("pod")

    def put(_record: Lease) -> None:
        raise ResourceExhausted("no space left on the disk")

    monkeypatch.setattr(store, "put", put)
    with pytest.raises(ResourceExhausted):
        ipam.release("pod")
    assert [lease.pod_id for lease in ipam.released()] == ["pod"]


def test_pool_hands_out_in_turn_and_leaves_out_what_is_not_a_hosts() -> None:
    pool = Pool(ip_network("10.1.0.0/29"))
    given = [str(pool.take(set())) for _ in range(6)]
    assert given == [f"10.1.0.{n}/29" for n in (2, 3, 4, 5, 6, 2)]


def test_last_address_of_ipv6_is_a_hosts() -> None:
    pool = Pool(ip_network("fd00::/126"))
    assert [str(pool.take(set()).ip) for _ in range(3)] == ["fd00::2", "fd00::3", "fd00::2"]


def test_lease_has_an_address_of_each_family_and_a_link(store: Store) -> None:
    lease = Ipam(store, PREFIX, (V4, V6)).acquire("a")
    assert lease.addresses == ("10.1.0.2/24", "fd00::2/64")
    assert lease.link.startswith(PREFIX)
    assert len(lease.link) == 15
    assert store.all(Lease) == [lease]


def test_acquire_again_gives_the_same(store: Store) -> None:
    ipam = Ipam(store, PREFIX, (V4,))
    assert ipam.acquire("a") == ipam.acquire("a")


def test_address_given_back_is_the_last_to_be_used_again(store: Store) -> None:
    ipam = Ipam(store, PREFIX, (ip_network("10.1.0.0/29"),))
    first = ipam.acquire("a")
    ipam.forget(first)
    later = [ipam.acquire(name).addresses for name in "bcdef"]
    assert later[-1] == first.addresses
    assert first.addresses not in later[:-1]


def test_the_turn_goes_on_after_a_restart(store: Store) -> None:
    ipam = Ipam(store, PREFIX, (V4,))
    for name in "abc":
        ipam.acquire(name)
    ipam.forget(ipam.leases["a"])
    assert Ipam(store, PREFIX, (V4,)).acquire("d").addresses == ("10.1.0.5/24",)


def test_exhaustion_of_one_family_takes_nothing_of_the_other(store: Store) -> None:
    ipam = Ipam(store, PREFIX, (V6, ip_network("10.1.0.0/30")))
    ipam.acquire("a")
    for _ in range(3):
        with pytest.raises(ResourceExhausted, match=r"10\.1\.0\.0/30: all 1 addresses"):
            ipam.acquire("b")
    assert store.all(Lease) == [ipam.leases["a"]]
    ipam.forget(ipam.leases["a"])
    assert ipam.acquire("b").addresses[1] == "10.1.0.2/30"


def test_outdated_lease_is_not_forgotten_for_the_new_one(store: Store) -> None:
    ipam = Ipam(store, PREFIX, (V4,))
    old = ipam.acquire("a")
    ipam.forget(old)
    new = ipam.acquire("a")
    ipam.forget(old)
    assert ipam.leases["a"] == new


def test_subnets_are_in_use_while_a_lease_is(store: Store) -> None:
    other = ip_network("10.2.0.0/24")
    ipam = Ipam(store, PREFIX, (V4,))
    lease = ipam.acquire("a")
    ipam.use((other,))
    assert ipam.acquire("b").addresses == ("10.2.0.2/24",)
    assert list(ipam.subnets) == [other, V4]
    ipam.forget(lease)
    assert list(ipam.subnets) == [other]


SUBNETS: list[Subnet] = [
    ip_network("10.1.0.0/28"),
    ip_network("10.1.0.0/29"),  # within the other
    ip_network("10.1.0.8/30"),
]


class Leasing(RuleBasedStateMachine):
    """Pods come and go, links linger, the agent restarts, the subnet changes: no address is ever given twice."""

    pods = Bundle("pods")
    links = Bundle("links")

    def __init__(self) -> None:
        super().__init__()
        self.subnet = SUBNETS[0]
        self.expected: dict[str, Lease] = {}
        self.count = 0
        self.cleanup = ExitStack()

    @initialize()
    def start(self) -> None:
        directory = self.cleanup.enter_context(TemporaryDirectory(prefix="na-test-"))
        self.store = self.cleanup.enter_context(closing(Store.open(Path(directory, "state.db"))))
        self.ipam = Ipam(self.store, PREFIX, (self.subnet, V6))

    @rule(target=pods)
    def attach(self) -> str:
        self.count += 1
        pod_id = str(self.count)
        try:
            self.expected[pod_id] = self.ipam.acquire(pod_id)
        except ResourceExhausted:
            held = {i.ip for lease in self.expected.values() for i in interfaces(lease)}
            gateways = {gateway(subnet).ip for subnet in SUBNETS}
            hosts = set(self.subnet.hosts())
            assert hosts <= held | gateways
        return pod_id

    @rule(pod=consumes(pods), target=links)
    def detach(self, pod: str) -> str:
        released = self.ipam.release(pod)
        assert (released is None) == (pod not in self.expected)
        if released is not None:
            self.expected[pod] = released
        return pod

    @rule(pod=consumes(links))
    def link_vanishes(self, pod: str) -> None:
        if lease := self.expected.pop(pod, None):
            self.ipam.forget(lease)

    @rule()
    def restart(self) -> None:
        self.ipam = Ipam(self.store, PREFIX, (self.subnet, V6))

    @precondition(lambda self: self.count)
    @rule(subnet=st.sampled_from(SUBNETS))
    def change_subnet(self, subnet: Subnet) -> None:
        self.subnet = subnet
        self.ipam.use((subnet, V6))

    @invariant()
    def no_address_and_no_link_is_there_twice(self) -> None:
        leases = self.ipam.leases.values()
        addresses = [i.ip for lease in leases for i in interfaces(lease)]
        assert len(addresses) == len(set(addresses))
        assert len({lease.link for lease in leases}) == len(leases)
        for lease in leases:
            for interface in interfaces(lease):
                network = interface.network
                assert interface != gateway(network)
                assert interface.ip not in (network.network_address, ip_interface("10.1.0.15").ip)

    @invariant()
    def store_and_memory_agree(self) -> None:
        assert self.ipam.leases == self.expected
        assert {lease.pod_id: lease for lease in self.store.all(Lease)} == self.expected

    def teardown(self) -> None:
        self.cleanup.close()


TestLeasing = Leasing.TestCase
TestLeasing.settings = settings(max_examples=60, stateful_step_count=40)
