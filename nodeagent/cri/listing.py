"""List calls, answered from memory: filters on records, and replies joined from the bytes of their items.

A record is replaced when it changes, so the bytes of an item are valid for as long as the record is the same object. A
list of 500 containers makes no protobuf message: each item is a field of the reply, already framed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from nodeagent.api import runtime_pb2 as pb
from nodeagent.cri import messages
from nodeagent.records import Container, Record, Sandbox

STREAM_MESSAGE_BYTES = 1 << 20

# All lists and stream items of the CRI hold their items in field 1: number << 3 | wire type LEN.
_ITEM_TAG = bytes([1 << 3 | 2])

R = TypeVar("R", bound=Record)


class Listing(Generic[R]):
    """Encodes records of one kind as repeated field 1 of a reply.

    source: returns all records; a `select` takes from them what a request asks for.
    """

    def __init__(self, source: Callable[[], list[R]], encode: Callable[[R], bytes]) -> None:
        self._source = source
        self._encode = encode
        self._known: dict[str, tuple[R, bytes]] = {}

    def reply(self, select: Callable[[list[R]], list[R]]) -> bytes:
        """The whole list, serialised."""
        return b"".join(self._items(select))

    def stream(self, select: Callable[[list[R]], list[R]]) -> Iterator[bytes]:
        """The list in parts, each a message of its own with at least one item."""
        part: list[bytes] = []
        size = 0
        for item in self._items(select):
            if part and size + len(item) > STREAM_MESSAGE_BYTES:
                yield b"".join(part)
                part, size = [], 0
            part.append(item)
            size += len(item)
        if part:
            yield b"".join(part)

    def _items(self, select: Callable[[list[R]], list[R]]) -> list[bytes]:
        records = self._source()
        # Bytes of removed records are dropped now and then, so that no removal has to know of this cache.
        if len(self._known) > 2 * len(records) + 64:
            self._known = {
                record.key: self._known[record.key]
                for record in records
                if record.key in self._known
            }
        return [self._item(record) for record in select(records)]

    def _item(self, record: R) -> bytes:
        known = self._known.get(record.key)
        if known is None or known[0] is not record:
            known = self._known[record.key] = (record, item(self._encode(record)))
        return known[1]


def item(body: bytes) -> bytes:
    """An item of a list, framed."""
    return _ITEM_TAG + _varint(len(body)) + body


def _varint(value: int) -> bytes:
    """Base 128, low digits first (protobuf encoding)."""
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)


# --- filters: every condition that is given must hold ---------------------------------------------------------------


def sandboxes(records: Iterable[Sandbox], given: pb.PodSandboxFilter) -> list[Sandbox]:
    found = by_id(records, given.id)
    if given.HasField("state"):
        found = [r for r in found if messages.sandbox_state(r) == given.state.state]
    return [r for r in found if has_labels(r.config.labels, given.label_selector)]


def containers(records: Iterable[Container], given: pb.ContainerFilter) -> list[Container]:
    found = members(records, given.id, given.pod_sandbox_id, given.label_selector)
    if given.HasField("state"):
        found = [r for r in found if messages.container_state(r) == given.state.state]
    return found


def members(
    records: Iterable[Container], container_id: str, sandbox_id: str, labels: Mapping[str, str]
) -> list[Container]:
    found = by_id(records, container_id)
    if sandbox_id:
        found = [r for r in found if r.sandbox_id.startswith(sandbox_id)]
        if len({r.sandbox_id for r in found}) > 1:
            return []
    return [r for r in found if has_labels(r.config.labels, labels)]


def by_id(records: Iterable[R], wanted: str) -> list[R]:
    """All records where no id is wanted, else the one that has it, or the only one that begins with it."""
    if not wanted:
        return list(records)
    found = [record for record in records if record.key.startswith(wanted)]
    exact = [record for record in found if record.key == wanted]
    return exact or (found if len(found) == 1 else [])


def has_labels(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    return all(labels.get(key) == value for key, value in selector.items())
