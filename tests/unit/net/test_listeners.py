"""Which sockets of the node a pod's host ports take over."""

import socket
import sys
from ipaddress import ip_address
from typing import Literal

import pytest

from nodeagent.net import listeners
from nodeagent.net.listeners import Listener
from nodeagent.records import HostPort

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue\n"
BOTH = (4, 6)

# As a machine prints them whose words are little-endian.
TCP = """\
   0: 0100007F:8719 00000000:0000 0A 00000000:00000000
   1: 00000000:0050 00000000:0000 0A 00000000:00000000
   2: 0100007F:0050 0100007F:9999 01 00000000:00000000
"""
TCP6 = """\
   0: 00000000000000000000000000000000:01BB 00000000000000000000000000000000:0000 0A 00000000:00000000
   1: B80D0120000000000000000001000000:0050 00000000000000000000000000000000:0000 0A 00000000:00000000
   2: 0000000000000000FFFF0000010200C0:0051 00000000000000000000000000000000:0000 0A 00000000:00000000
"""
UDP = """\
   1: 0100007F:0035 0100007F:1111 01 00000000:00000000
   2: 00000000:0043 00000000:0000 07 00000000:00000000
"""

little_endian = pytest.mark.skipif(sys.byteorder != "little", reason="its words are the other way")


@little_endian
@pytest.mark.parametrize(
    ("protocol", "rows", "expected"),
    [
        ("tcp", TCP, ["127.0.0.1:34585", "0.0.0.0:80"]),
        ("tcp", TCP6, ["[::]:443", "[2001:db8::1]:80", "192.0.2.1:81"]),
        ("udp", UDP, ["0.0.0.0:67"]),
        ("udp", "", []),
    ],
)
def test_tables_of_the_kernel(protocol: str, rows: str, expected: list[str]) -> None:
    lines = (HEAD + rows).splitlines(keepends=True)
    assert [str(one) for one in listeners.parse(iter(lines), protocol)] == expected


def test_connections_are_not_read() -> None:
    """There may be a million of them."""

    def lines() -> object:
        yield HEAD
        yield TCP.splitlines()[1]
        yield TCP.splitlines()[2]
        raise AssertionError("read on")

    assert len(list(listeners.parse(lines(), "tcp"))) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "protocol"), [(socket.SOCK_STREAM, "tcp"), (socket.SOCK_DGRAM, "udp")]
)
def test_a_socket_of_this_machine_is_found(kind: int, protocol: str) -> None:
    with socket.socket(socket.AF_INET, kind) as opened:
        opened.bind(("127.0.0.1", 0))
        if protocol == "tcp":
            opened.listen()
        where = Listener(ip_address("127.0.0.1"), opened.getsockname()[1])
        assert where in listeners.read(protocol)
    assert where not in listeners.read(protocol)


def told(
    monkeypatch: pytest.MonkeyPatch,
    listening: str,
    *,
    host_ip: str = "",
    versions: tuple[int, ...] = BOTH,
    protocol: Literal["tcp", "udp", "sctp"] = "tcp",
) -> list[str]:
    monkeypatch.setattr(listeners, "read", lambda _: [Listener(ip_address(listening), 80)])
    port = HostPort(
        protocol=protocol, host_ip=host_ip, host_port=80, pod_id="a", container_port=8080
    )
    other = HostPort(
        protocol=protocol, host_ip=host_ip, host_port=81, pod_id="a", container_port=8080
    )
    return list(listeners.warnings([other, port], versions))


@pytest.mark.parametrize(
    ("listening", "host_ip", "versions"),
    [
        ("0.0.0.0", "", BOTH),
        ("0.0.0.0", "192.0.2.1", BOTH),
        ("127.0.0.1", "", (4,)),
        ("127.0.0.1", "0.0.0.0", (4,)),
        ("192.0.2.1", "192.0.2.1", (4,)),
        ("::", "", (4,)),
        ("::", "192.0.2.1", (4,)),
        ("2001:db8::1", "::", BOTH),
    ],
)
def test_what_a_pod_takes_is_told(
    monkeypatch: pytest.MonkeyPatch, listening: str, host_ip: str, versions: tuple[int, ...]
) -> None:
    (line,) = told(monkeypatch, listening, host_ip=host_ip, versions=versions)
    assert line == (
        f'pod "a": host port tcp 80: a process of the node listens on {Listener(ip_address(listening), 80)}; '
        "what comes to it goes to the pod instead"
    )


@pytest.mark.parametrize(
    ("listening", "host_ip", "versions"),
    [
        ("192.0.2.1", "192.0.2.2", BOTH),
        ("127.0.0.1", "192.0.2.1", BOTH),
        ("0.0.0.0", "", (6,)),
        ("0.0.0.0", "::", BOTH),
        ("2001:db8::1", "", (4,)),
        ("::1", "", BOTH),
    ],
)
def test_what_no_pod_takes_is_not(
    monkeypatch: pytest.MonkeyPatch, listening: str, host_ip: str, versions: tuple[int, ...]
) -> None:
    assert told(monkeypatch, listening, host_ip=host_ip, versions=versions) == []


def test_sctp_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch, "0.0.0.0", protocol="sctp") == []
