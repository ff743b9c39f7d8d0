"""Messages of nf_tables over nfnetlink: tables, chains, rules, sets and maps.

Names, numbers and semantics are those of linux/netfilter/nf_tables.h and nft(8); all numbers are in network byte order.
What the rules are for is not known here. Statements and matches are byte strings, one or more expressions each; a rule
is their concatenation.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from nodeagent.net.netlink import (
    NETLINK_NETFILTER,
    NLM_F_APPEND,
    NLM_F_CREATE,
    Connection,
    Request,
    attribute,
    attribute_list,
    attributes,
    be32,
    nested,
    text,
    u8,
)

# of linux/netfilter.h and linux/socket.h
NFPROTO_INET = 1
NFPROTO_IPV4 = 2
NFPROTO_BRIDGE = 7
NFPROTO_IPV6 = 10
_FAMILIES = {NFPROTO_INET: "inet", NFPROTO_BRIDGE: "bridge"}
HOOKS = {"prerouting": 0, "input": 1, "forward": 2, "output": 3, "postrouting": 4}
_DROP = 0
_ACCEPT = 1
_JUMP = -3
_GOTO = -4
_RETURN = -5

_NFNL_SUBSYS_NFTABLES = 10
_BATCH_BEGIN = 0x10
_BATCH_END = 0x11
_NEWTABLE, _GETTABLE, _DELTABLE = 0, 1, 2
_NEWCHAIN = 3
_NEWRULE = 6
_NEWSET = 9
_NEWSETELEM, _GETSETELEM, _DELSETELEM = 12, 13, 14
_NFT_SET_MAP = 0x8
_NFT_SET_EVAL = 0x20
_DYNAMIC_SET_SIZE = 1 << 16

_NFGENMSG = struct.Struct(">BBH")
_ELEMENTS_PER_MESSAGE = 100  # a nested attribute has at most 64 KiB


# --- data types, as nft(8) names and numbers them -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DataType:
    """A type of data. number: by it user space tells types apart; the kernel only keeps it."""

    number: int
    size: int


IPV4_ADDR = DataType(7, 4)
IPV6_ADDR = DataType(8, 16)
ETHER_ADDR = DataType(9, 6)
INET_PROTO = DataType(12, 1)
INET_SERVICE = DataType(13, 2)
IFNAME = DataType(41, 16)


_PROTOCOLS = {6: "tcp", 17: "udp", 132: "sctp"}


def _type_number(types: Sequence[DataType]) -> int:
    number = 0
    for part in types:
        number = number << 6 | part.number
    return number


def _type_size(types: Sequence[DataType]) -> int:
    return sum(_padded(part.size) for part in types)


def _padded(size: int) -> int:
    """The bytes, padded: each part of a concatenation fills whole registers of 32 bits."""
    return size + -size % 4


def concatenation(*parts: bytes) -> bytes:
    """The value of a key or of data, as registers hold it."""
    return b"".join(part + bytes(-len(part) % 4) for part in parts)


def _words(types: Sequence[DataType], value: bytes) -> str:
    """A key or data as nft(8) writes it: "10.88.0.2 . 80"."""
    words = []
    for part in types:
        words.append(_word(part, value[: part.size]))
        value = value[_padded(part.size) :]
    return " . ".join(words)


def _word(kind: DataType, value: bytes) -> str:
    if kind in (IPV4_ADDR, IPV6_ADDR):
        return str(ip_address(value))
    if kind == ETHER_ADDR:
        return value.hex(":")
    if kind == IFNAME:
        return value.rstrip(b"\0").decode(errors="replace")
    number = int.from_bytes(value, "big")
    return _PROTOCOLS.get(number, str(number)) if kind == INET_PROTO else str(number)


# --- expressions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Load:
    """An expression that loads a value of `size` bytes into the register that it is given."""

    name: str
    size: int
    attributes: bytes

    def into(self, register: int) -> bytes:
        return _expression(self.name, be32(1, register), self.attributes)


def _expression(name: str, *attributes: bytes) -> bytes:
    return nested(1, text(1, name), nested(2, *attributes))


def _meta(key: int, size: int) -> Load:
    return Load("meta", size, be32(2, key))


def _payload(base: int, offset: int, size: int) -> Load:
    return Load("payload", size, be32(2, base) + be32(3, offset) + be32(4, size))


NFPROTO = _meta(15, 1)
L4PROTO = _meta(16, 1)
IIFNAME = _meta(6, 16)
OIFNAME = _meta(7, 16)
ETHER_SADDR = _payload(0, 6, 6)
ETHER_TYPE = _payload(0, 12, 2)
ARP_KINDS = _payload(1, 0, 6)  # of hardware and protocol: types, and lengths of addresses
ARP_SADDR_ETHER = _payload(1, 8, 6)
ARP_SADDR_IP = _payload(1, 14, 4)
IP_SADDR = _payload(1, 12, 4)
IP_DADDR = _payload(1, 16, 4)
IP6_SADDR = _payload(1, 8, 16)
IP6_DADDR = _payload(1, 24, 16)
TH_DPORT = _payload(2, 2, 2)
ICMPV6_TYPE = _payload(2, 0, 1)
ND_TARGET = _payload(2, 8, 16)
FRAGMENT_OFFSET = Load("exthdr", 2, u8(2, 44) + be32(3, 2) + be32(4, 2))  # and three flags
CT_ORIGINAL_IP_DADDR = Load("ct", 4, be32(2, 20) + u8(3, 0))
CT_ORIGINAL_IP6_DADDR = Load("ct", 16, be32(2, 22) + u8(3, 0))
FIB_DADDR_TYPE = Load("fib", 4, be32(2, 3) + be32(3, 2))

RTN_LOCAL = struct.pack("=I", 2)  # the one value in the machine's byte order

_REGISTER = 8  # NFT_REG32_00, the first of sixteen with 32 bits


def equal(load: Load, value: bytes) -> bytes:
    """A match: the loaded value, or as many first bytes as `value` has, is equal to it."""
    return load.into(_REGISTER) + _compare(0, value)


def differs(load: Load, value: bytes) -> bytes:
    return load.into(_REGISTER) + _compare(1, value)


def within(load: Load, prefix: bytes, prefixlen: int) -> bytes:
    """A match: the first `prefixlen` bits are those of `prefix`."""
    mask = ((1 << prefixlen) - 1) << (load.size * 8 - prefixlen)
    return _masked(load, mask) + _compare(0, prefix)


def has_bits(load: Load, mask: int) -> bytes:
    """A match: any of the bits of `mask` is set."""
    return _masked(load, mask) + _compare(1, bytes(load.size))


def _masked(load: Load, mask: int) -> bytes:
    return load.into(_REGISTER) + _expression(
        "bitwise",
        be32(1, _REGISTER),
        be32(2, _REGISTER),
        be32(3, load.size),
        nested(4, attribute(1, mask.to_bytes(load.size, "big"))),
        nested(5, attribute(1, bytes(load.size))),
    )


def interface(name: str) -> bytes:
    return name.encode().ljust(16, b"\0")


def in_set(loads: Sequence[Load], name: str) -> bytes:
    """A match: the concatenated values are an element of a set."""
    return _concatenate(loads) + _expression("lookup", text(1, name), be32(2, _REGISTER))


def add_to_set(load: Load, name: str) -> bytes:
    """A statement: the value becomes an element of a dynamic set."""
    added = _expression("dynset", text(1, name), be32(3, 0), be32(4, _REGISTER))
    return load.into(_REGISTER) + added


def dnat_to_map(loads: Sequence[Load], name: str, nfproto: int) -> bytes:
    """A statement: destination NAT to what a map has for the concatenated values; without an entry, no match."""
    address = IPV4_ADDR if nfproto == NFPROTO_IPV4 else IPV6_ADDR
    looked_up = _expression("lookup", text(1, name), be32(2, _REGISTER), be32(3, _REGISTER))
    translated = _expression(
        "nat",
        be32(1, 1),
        be32(2, nfproto),
        be32(3, _REGISTER),
        be32(5, _REGISTER + address.size // 4),
    )
    return _concatenate(loads) + looked_up + translated


def masquerade() -> bytes:
    return _expression("masq")


def accept() -> bytes:
    """A statement: accept for this base chain; chains of other tables still see the packet (nft(8), VERDICT)."""
    return _verdict(_ACCEPT)


def drop() -> bytes:
    return _verdict(_DROP)


def return_() -> bytes:
    return _verdict(_RETURN)


def jump(chain: str) -> bytes:
    return _verdict(_JUMP, text(2, chain))


def goto(chain: str) -> bytes:
    return _verdict(_GOTO, text(2, chain))


def _compare(operation: int, value: bytes) -> bytes:
    return _expression(
        "cmp", be32(1, _REGISTER), be32(2, operation), nested(3, attribute(1, value))
    )


def _concatenate(loads: Sequence[Load]) -> bytes:
    expressions = []
    register = _REGISTER
    for load in loads:
        expressions.append(load.into(register))
        register += _padded(load.size) // 4
    return b"".join(expressions)


def _verdict(code: int, *target: bytes) -> bytes:
    verdict = nested(2, be32(1, code & 0xFFFFFFFF), *target)
    return _expression("immediate", be32(1, 0), nested(2, verdict))


# --- objects --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain. kind, hook and priority are those of nft(8), and empty for a chain that is only jumped to."""

    name: str
    kind: str = ""
    hook: str = ""
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Set:
    """A set, or a map where `data` is given. dynamic: rules add elements to it."""

    name: str
    key: tuple[DataType, ...]
    data: tuple[DataType, ...] = ()
    dynamic: bool = False

    def describe(self, element: Element) -> str:
        """An element of it as nft(8) writes one: "any4 { tcp . 80 : 10.88.0.2 . 8080 }"."""
        words = _words(self.key, element.key)
        if self.data:
            words += f" : {_words(self.data, element.data)}"
        return f"{self.name} {{ {words} }}"


@dataclass(frozen=True, slots=True)
class Element:
    """An element of a set or map; key and data are as `concatenation` makes them."""

    set: str
    key: bytes
    data: bytes = b""


class Table:
    """Messages about one table, of family inet unless given another, and about its content."""

    def __init__(self, name: str, nfproto: int = NFPROTO_INET) -> None:
        self.name = name
        self._nfproto = nfproto
        self._label = f"nft table {_FAMILIES[nfproto]} {name}"

    def __str__(self) -> str:
        return self._label

    def create(self) -> Request:
        return self._request("create", _NEWTABLE, text(1, self.name), flags=NLM_F_CREATE)

    def look_up(self) -> Request:
        return self._request("look up", _GETTABLE, text(1, self.name))

    def delete(self) -> Request:
        return self._request("delete", _DELTABLE, text(1, self.name))

    def remove(self) -> list[Request]:
        """The requests that delete the table, whether it exists or not."""
        return [self.create(), self.delete()]

    def replace(
        self,
        sets: Iterable[Set],
        chains: Iterable[Chain],
        rules: Iterable[tuple[str, tuple[bytes, ...]]],
        elements: Iterable[Element],
    ) -> list[Request]:
        """The requests that replace the table by one with all of this. A rule is its chain, then its expressions."""
        return [
            *self.remove(),
            self.create(),
            *map(self.add_set, sets),
            *map(self.add_chain, chains),
            *(self.add_rule(chain, *rule) for chain, rule in rules),
            *self.add_elements(elements),
        ]

    def add_chain(self, chain: Chain) -> Request:
        body = [text(1, self.name), text(3, chain.name)]
        if chain.hook:
            priority = be32(2, chain.priority & 0xFFFFFFFF)
            body += [nested(4, be32(1, HOOKS[chain.hook]), priority), text(7, chain.kind)]
        return self._request(f"add chain {chain.name}", _NEWCHAIN, *body, flags=NLM_F_CREATE)

    def add_rule(self, chain: str, *expressions: bytes) -> Request:
        return self._request(
            f"add a rule to {chain}",
            _NEWRULE,
            text(1, self.name),
            text(2, chain),
            nested(4, *expressions),
            flags=NLM_F_CREATE | NLM_F_APPEND,
        )

    def add_set(self, one: Set) -> Request:
        body = [
            text(1, self.name),
            text(2, one.name),
            be32(3, (_NFT_SET_MAP if one.data else 0) | (_NFT_SET_EVAL if one.dynamic else 0)),
            be32(4, _type_number(one.key)),
            be32(5, _type_size(one.key)),
            be32(10, 1),  # refers to it within a transaction, where nothing here does
        ]
        if one.data:
            body += [be32(6, _type_number(one.data)), be32(7, _type_size(one.data))]
        if one.dynamic:
            body.append(nested(9, be32(1, _DYNAMIC_SET_SIZE)))
        return self._request(f"add set {one.name}", _NEWSET, *body, flags=NLM_F_CREATE)

    def add_elements(self, elements: Iterable[Element]) -> list[Request]:
        """The requests that add elements; one that is there already, with the same data, stays."""
        return self._elements("add to", _NEWSETELEM, elements, NLM_F_CREATE)

    def delete_elements(self, elements: Iterable[Element]) -> list[Request]:
        return self._elements("delete from", _DELSETELEM, elements, 0)

    def elements(self, connection: Connection, name: str) -> Iterator[Element]:
        """The elements of a set, to be read to the end. Raises FileNotFoundError without the set, or the table."""
        request = self._request(
            f"list {name}", _GETSETELEM, text(1, self.name), text(2, name), flags=0
        )
        for body in connection.dump(request):
            listed = attributes(body[_NFGENMSG.size :]).get(3, b"")
            for _, element in attribute_list(listed):
                parts = attributes(element)
                yield Element(name, _value(parts.get(1, b"")), _value(parts.get(2, b"")))

    def _elements(
        self, verb: str, kind: int, elements: Iterable[Element], flags: int
    ) -> list[Request]:
        by_set: dict[str, list[Element]] = {}
        for element in elements:
            by_set.setdefault(element.set, []).append(element)
        return [
            self._request(
                f"{verb} {name}",
                kind,
                text(1, self.name),
                text(2, name),
                nested(3, *map(_element, members[start : start + _ELEMENTS_PER_MESSAGE])),
                flags=flags,
            )
            for name, members in by_set.items()
            for start in range(0, len(members), _ELEMENTS_PER_MESSAGE)
        ]

    def _request(self, verb: str, kind: int, *body: bytes, flags: int = 0) -> Request:
        header = _NFGENMSG.pack(self._nfproto, 0, 0)
        kind |= _NFNL_SUBSYS_NFTABLES << 8
        return Request(f"{self._label}: {verb}", kind, flags, header + b"".join(body))


def _element(element: Element) -> bytes:
    parts = [nested(1, attribute(1, element.key))]
    if element.data:
        parts.append(nested(2, attribute(1, element.data)))
    return nested(1, *parts)


def _value(data: bytes) -> bytes:
    """The value that a nested attribute of key or data has; b"" for a verdict, or without data."""
    return attributes(data).get(1, b"")


# --- transactions ---------------------------------------------------------------------------------------------------


def connect() -> Connection:
    """Open a connection. Raises `OSError` (EPROTONOSUPPORT) on a kernel without nfnetlink."""
    return Connection.open(NETLINK_NETFILTER)


def discard(table: Table) -> None:
    """Delete a table if it exists, which it does not on a kernel that cannot have it."""
    try:
        with connect() as connection:
            transact(connection, table.remove())
    except OSError:
        pass


def transact(connection: Connection, requests: Sequence[Request]) -> None:
    """Execute all of the requests or none. Raises the `OSError` of the first that was refused."""
    connection.commit(_framing("begin", _BATCH_BEGIN), requests, _framing("end", _BATCH_END))


def try_out(connection: Connection, requests: Sequence[Request]) -> None:
    """Try the requests like `transact`, but change nothing."""
    connection.commit(_framing("begin", _BATCH_BEGIN), requests, None)


def _framing(what: str, kind: int) -> Request:
    header = _NFGENMSG.pack(0, 0, _NFNL_SUBSYS_NFTABLES)
    return Request(f"nft transaction: {what}", kind, 0, header)
