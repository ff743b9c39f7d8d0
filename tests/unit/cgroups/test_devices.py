"""The device program is run by a small interpreter of the instructions that it uses."""

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.cgroups import devices
from nodeagent.cgroups.devices import Rule
from nodeagent.errors import InvalidArgument

_MASK = 0xFFFFFFFF


def run(code: bytes, context: bytes) -> int:
    registers = [0] * 11
    position = 0
    while True:
        opcode, pair, offset, value = struct.unpack_from("<BBhi", code, position * 8)
        target, source = pair & 15, pair >> 4
        position += 1
        operand = registers[source] if opcode & 0x08 else value & _MASK
        match opcode & 0xF7:
            case 0x61:
                (registers[target],) = struct.unpack_from("<I", context, offset)
            case 0xB4:
                registers[target] = operand
            case 0x54:
                registers[target] &= operand
            case 0x74:
                registers[target] >>= operand
            case 0x56:
                position += offset if registers[target] != operand else 0
            case 0x95:
                return registers[0]
            case _:
                raise AssertionError(f"opcode {opcode:#x}")


def allowed(rules: list[Rule], kind: str, major: int, minor: int, access: str) -> bool:
    bits = sum({"m": 1, "r": 2, "w": 4}[letter] for letter in access)
    context = struct.pack("<III", bits << 16 | {"b": 1, "c": 2}[kind], major, minor)
    return run(devices.program(rules), context) == 1


kinds = st.sampled_from(["b", "c"])
accesses = st.sets(st.sampled_from("rwm"), min_size=1).map(lambda letters: "".join(sorted(letters)))
numbers = st.integers(0, 3)
rules = st.builds(Rule, kinds, st.none() | numbers, st.none() | numbers, accesses)


@given(st.lists(rules, max_size=6), kinds, numbers, numbers, accesses)
def test_one_rule_must_allow_the_whole_access(
    given_rules: list[Rule], kind: str, major: int, minor: int, access: str
) -> None:
    expected = any(
        rule.type == kind
        and rule.major in (None, major)
        and rule.minor in (None, minor)
        and set(access) <= set(rule.access)
        for rule in given_rules
    )
    assert allowed(given_rules, kind, major, minor, access) == expected


def test_defaults() -> None:
    default = list(devices.DEFAULT_RULES)
    for minor in (3, 5, 7, 8, 9):
        assert allowed(default, "c", 1, minor, "rw")
    assert allowed(default, "c", 136, 77, "rw")
    assert allowed(default, "b", 8, 0, "m")
    for (kind, major, minor), access in itertools.product(
        [("b", 8, 0), ("c", 1, 1), ("c", 1, 11), ("c", 5, 1), ("c", 10, 229)], "rw"
    ):
        assert not allowed(default, kind, major, minor, access)


def test_as_text_of_v1() -> None:
    assert [str(rule) for rule in devices.DEFAULT_RULES[:3]] == ["c *:* m", "b *:* m", "c 1:3 rwm"]


@pytest.mark.parametrize("access", ["", "x", "rwx"])
def test_access_is_rwm(access: str) -> None:
    with pytest.raises(InvalidArgument, match="rwm"):
        Rule("c", 1, 3, access)
