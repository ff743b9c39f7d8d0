from contextlib import suppress

from hypothesis import given
from hypothesis import strategies as st

from nodeagent.net import netlink
from nodeagent.net.netlink import Request

KINDS = st.integers(0, 0x3FFF)
PAYLOADS = st.binary(max_size=200)


@given(st.dictionaries(KINDS, PAYLOADS))
def test_attributes_come_back(content: dict[int, bytes]) -> None:
    packed = b"".join(netlink.attribute(kind, payload) for kind, payload in content.items())
    assert len(packed) % 4 == 0
    assert netlink.attributes(packed) == content


@given(KINDS, st.dictionaries(KINDS, PAYLOADS))
def test_nested_attributes_come_back(kind: int, content: dict[int, bytes]) -> None:
    packed = netlink.nested(kind, *(netlink.attribute(k, p) for k, p in content.items()))
    (inner,) = netlink.attributes(packed).values()
    assert netlink.attributes(inner) == content


@given(st.lists(st.tuples(st.integers(0, 0xFFFF), st.integers(0, 0xFFFFFFFF), PAYLOADS)))
def test_messages_come_back(content: list[tuple[int, int, bytes]]) -> None:
    packed = b"".join(Request("", kind, 0, body).pack(sequence) for kind, sequence, body in content)
    found = [(m.kind, m.sequence, m.body) for m in netlink.messages(packed)]
    assert found == content


@given(st.binary(max_size=100))
def test_any_bytes_are_decoded_or_refused(data: bytes) -> None:
    for decode in (netlink.attributes, lambda d: list(netlink.messages(d))):
        with suppress(ValueError):
            decode(data)
