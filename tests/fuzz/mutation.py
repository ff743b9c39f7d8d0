"""Valid inputs with a few things made wrong in them."""

import json
from collections.abc import Iterator
from random import Random
from typing import Any

# What parsers trip over: lengths, the ends of numbers, other alphabets, depth.
PIECES = (
    *(b"", b"\0", b"\n", b"\r\n", b"\\", b'"', b"-1", b"%00", b"/../", b"[", b"]"),
    *(b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xed\xa0\x80", "²٣\u2028\x85".encode()),
    *(b"9" * 20, b"9" * 5000, b"[" * 50_000, b'{"a":' * 20_000, b"a" * 10_000),
)
VALUES: tuple[Any, ...] = (
    *(None, True, "", {}, [], [[]], -1, 0, 1 << 31, 1 << 63, 1 << 64, 10**400, 1.5, -0.0, 1e308),
    *("\0", "é\u2028", "\ud800", "/", "..", "٣", "²", "9" * 20, "9" * 5000, "a" * 10_000),
    *("=", ":", "9:9", "a:b:c", "1.2", "{", json.loads("[" * 500 + "]" * 500)),
)


def changed(data: bytes, random: Random) -> bytes:
    """Some bytes replaced, left out, doubled or put in."""
    for _ in range(random.randint(0, 4)):
        start = random.randint(0, len(data))
        end = start + random.randint(0, 8)
        piece = random.choice(
            [data[start:end] * 2, random.randbytes(random.randint(1, 8)), random.choice(PIECES)]
        )
        data = data[:start] + piece + data[end:]
    return data


def rewritten(data: bytes, random: Random) -> bytes:
    """Data that begins with a JSON document, with some of its values replaced or left out; other data is `changed`."""
    try:
        document, end = json.JSONDecoder().raw_decode(data.decode("latin-1"))
    except (ValueError, RecursionError):
        return changed(data, random)
    for _ in range(random.randint(1, 3)):
        places = [*_places(document)]
        if not places:
            break
        holder, key = random.choice(places)
        if random.randint(0, 4):
            holder[key] = random.choice([*VALUES, holder[key], random.choice(places)[0]])
        else:
            del holder[key]
    try:
        return json.dumps(document).encode() + data[end:]
    except (ValueError, RecursionError):  # a value has become part of itself
        return changed(data, random)


def _places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Every place that has a value, down to some depth: its holder, and key or index."""
    keys = (
        [*value] if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    )
    for key in keys:
        yield value, key
        if depth < 10:
            yield from _places(value[key], depth + 1)
