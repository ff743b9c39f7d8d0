from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from nodeagent.errors import AlreadyExists, InvalidArgument
from nodeagent.net import hostports
from nodeagent.net.hostports import HostPorts
from nodeagent.records import HostPort
from nodeagent.requests import PortMapping
from nodeagent.store import Store

BOTH = (4, 6)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(tmp_path / "state.db")
    yield opened
    opened.close()


def mapping(
    host_port: int,
    host_ip: str = "",
    protocol: Literal["tcp", "udp", "sctp"] = "tcp",
    container_port: int = 80,
) -> PortMapping:
    return PortMapping(
        protocol=protocol, container_port=container_port, host_port=host_port, host_ip=host_ip
    )


def test_reserved_ports_are_remembered(store: Store) -> None:
    ports = HostPorts(store).reserve("a", [mapping(80), mapping(53, "192.0.2.1", "udp")], BOTH)
    assert [port.key for port in ports] == ["tcp//80", "udp/192.0.2.1/53"]
    again = HostPorts(store)
    assert sorted(port.key for port in again.of("a")) == ["tcp//80", "udp/192.0.2.1/53"]
    with pytest.raises(AlreadyExists):
        again.reserve("b", [mapping(80)], BOTH)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("", ""),
        ("", "192.0.2.1"),
        ("fd00::1", ""),
        ("0.0.0.0", "192.0.2.1"),
        ("::", "fd00::1"),
        ("0.0.0.0", ""),
        ("fd00::1", "fd00:0::1"),
    ],
)
def test_overlapping_addresses_conflict(one: str, other: str, store: Store) -> None:
    ports = HostPorts(store)
    ports.reserve("a", [mapping(80, one)], BOTH)
    with pytest.raises(AlreadyExists, match=r'host port tcp 80.*: pod "a" has it'):
        ports.reserve("b", [mapping(81), mapping(80, other)], BOTH)
    assert ports.of("b") == []
    assert len(store.all(HostPort)) == 1


@pytest.mark.parametrize(
    "other",
    [
        mapping(81, "192.0.2.1"),
        mapping(80, "192.0.2.2"),
        mapping(80, "192.0.2.1", "udp"),
        mapping(80, "::"),
    ],
)
def test_others_do_not_conflict(other: PortMapping, store: Store) -> None:
    ports = HostPorts(store)
    ports.reserve("a", [mapping(80, "192.0.2.1")], BOTH)
    assert len(ports.reserve("b", [other], BOTH)) == 1


def test_one_pod_can_ask_twice_for_the_same(store: Store) -> None:
    ports = HostPorts(store)
    assert len(ports.reserve("a", [mapping(80), mapping(80)], BOTH)) == 1
    assert len(ports.reserve("a", [mapping(80)], BOTH)) == 1
    with pytest.raises(AlreadyExists, match='"a"'):
        ports.reserve("a", [mapping(80), mapping(80, container_port=81)], BOTH)


def test_reservation_replaces_the_earlier_one(store: Store) -> None:
    ports = HostPorts(store)
    ports.reserve("a", [mapping(80)], BOTH)
    ports.reserve("a", [mapping(81)], BOTH)
    ports.reserve("b", [mapping(80)], BOTH)
    assert {port.key: port.pod_id for port in store.all(HostPort)} == {
        "tcp//80": "b",
        "tcp//81": "a",
    }


def test_release_gives_all_back(store: Store) -> None:
    ports = HostPorts(store)
    ports.reserve("a", [mapping(80), mapping(81)], BOTH)
    ports.release("a")
    ports.release("a")
    assert ports.all() == store.all(HostPort) == []


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (mapping(65536), r"ports\[1\]\.host_port: 65536"),
        (mapping(-1), r"ports\[1\]\.host_port: -1"),
        (mapping(80, container_port=0), r"ports\[1\]\.container_port: 0"),
        (mapping(80, container_port=70000), r"ports\[1\]\.container_port: 70000"),
        (mapping(80, "localhost"), r'ports\[1\]\.host_ip: "localhost"'),
    ],
)
def test_a_malformed_mapping_is_refused_by_its_field(wrong: PortMapping, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        hostports.check(wrong, "ports[1]")


def test_a_port_that_is_not_published_needs_no_number() -> None:
    hostports.check(mapping(0, container_port=0), "ports[0]")


def test_an_address_of_another_family_is_passed_over(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    ports = HostPorts(store)
    held = ports.reserve("a", [mapping(80, "::"), mapping(80, "0.0.0.0")], (4,))
    assert [port.host_ip for port in held] == ["0.0.0.0"]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == "port mapping tcp 80 of host_ip ::: ignored, as the pod has no IPv6 address"
