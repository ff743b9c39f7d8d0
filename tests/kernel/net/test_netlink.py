"""The kernel's answers, as `Connection` reports them."""

import errno
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from nodeagent.net import netlink, nftables, veth
from nodeagent.net.netlink import NETLINK_ROUTE, Connection, Request
from nodeagent.net.nftables import IPV4_ADDR, Element, Set, Table
from tests.kernel.net.world import Namespace, needs_nf_tables

RTM_NEWLINK = 16
RTM_GETLINK = 18
IFLA_LINKINFO = 18
IFLA_INFO_KIND = 1
IFINFOMSG = struct.Struct("=BxHiII")
LOOPBACK = IFINFOMSG.pack(0, 0, 1, 0, 0)
NO_LINK = IFINFOMSG.pack(0, 0, 77, 0, 0)


@pytest.fixture
def route() -> Iterator[Connection]:
    with Namespace.new() as namespace:
        connection = Connection(namespace.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE))
        with connection:
            yield connection


def test_refusal_names_link_and_operation(route: Connection) -> None:
    with pytest.raises(OSError, match="link nv1: delete") as refusal:
        veth.delete(route, "nv1")
    assert refusal.value.errno == errno.ENODEV


def test_first_refusal_of_several_is_told_and_the_others_are_done(route: Connection) -> None:
    requests = [
        Request("first", RTM_GETLINK, 0, NO_LINK),
        Request("second", RTM_GETLINK, 0, NO_LINK),
        Request("third", RTM_GETLINK, 0, LOOPBACK),
    ]
    with pytest.raises(OSError, match="first"):
        route.perform(*requests)
    assert route.ask(Request("loopback", RTM_GETLINK, 0, LOOPBACK))


def test_the_kernels_own_words_are_told(route: Connection) -> None:
    kind = netlink.nested(IFLA_LINKINFO, netlink.text(IFLA_INFO_KIND, "no-such-kind"))
    request = Request(
        "link x: create", RTM_NEWLINK, netlink.NLM_F_CREATE, IFINFOMSG.pack(*[0] * 5) + kind
    )
    with pytest.raises(OSError, match=r"\(Unknown device type\)"):
        route.perform(request)


def test_dump_gives_every_message(route: Connection) -> None:
    (loopback,) = route.dump(Request("links", RTM_GETLINK, 0, IFINFOMSG.pack(0, 0, 0, 0, 0)))
    assert IFINFOMSG.unpack_from(loopback)[2] == 1


def test_strangers_are_not_taken_for_the_kernel() -> None:
    with Namespace.new() as namespace:
        ours, theirs = (
            namespace.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE) for _ in range(2)
        )
        ours.bind((0, 0))
        with Connection(ours) as connection:
            forged = Request("", netlink.NLMSG_ERROR, 0, struct.pack("=i", -errno.EPERM))
            number = next(connection._sequences) + 1
            theirs.sendto(forged.pack(number), (ours.getsockname()[0], 0))
            assert connection.ask(Request("loopback", RTM_GETLINK, 0, LOOPBACK))
        theirs.close()


@pytest.fixture
def nf() -> Iterator[Connection]:
    with Namespace.new() as namespace:
        with namespace.entered():
            connection = nftables.connect()
        with connection:
            yield connection


@needs_nf_tables
def test_transaction_happens_whole_or_not_at_all(nf: Connection) -> None:
    table = Table("whole")
    missing = table.add_elements([Element("nowhere", bytes(4))])
    with pytest.raises(FileNotFoundError, match="nft table inet whole: add to nowhere"):
        nftables.transact(nf, [table.create(), *missing, table.add_set(Set("later", (IPV4_ADDR,)))])
    with pytest.raises(FileNotFoundError):
        nf.ask(table.look_up())
    nftables.transact(nf, [table.create()])
    assert nf.ask(table.look_up())


@needs_nf_tables
def test_what_is_tried_out_does_not_happen(nf: Connection) -> None:
    table = Table("tried")
    nftables.try_out(nf, [table.create(), table.add_set(Set("some", (IPV4_ADDR,)))])
    with pytest.raises(FileNotFoundError):
        nf.ask(table.look_up())
    with pytest.raises(FileNotFoundError, match="add to nowhere"):
        nftables.try_out(nf, table.add_elements([Element("nowhere", bytes(4))]))


@needs_nf_tables
def test_transaction_may_be_long(nf: Connection) -> None:
    table = Table("long")
    addresses = [os.urandom(4) for _ in range(5000)]
    requests = [table.create(), table.add_set(Set("many", (IPV4_ADDR,)))]
    nftables.transact(nf, requests + table.add_elements(Element("many", a) for a in addresses))
    nftables.transact(nf, table.delete_elements(Element("many", a) for a in set(addresses)))
