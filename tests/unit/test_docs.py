"""The documents say what is so: they are compared with the contract."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent.api import runtime_pb2 as pb

PROJECT = Path(__file__).parents[2]
METHODS = [
    method for service in pb.DESCRIPTOR.services_by_name.values() for method in service.methods
]

# Refused by this name; nothing in it is looked at.
WHOLE = "windows"


def requested() -> dict[str, set[str]]:
    """The fields of all messages that a request may hold, but for those of another system."""
    found: dict[str, set[str]] = {}
    pending = [method.input_type for method in METHODS]
    while pending:
        message = pending.pop()
        if message.name in found or message.GetOptions().map_entry:
            continue
        found[message.name] = set(message.fields_by_name)
        fields = (field for field in message.fields if field.name != WHOLE)
        pending += [field.message_type for field in fields if field.message_type is not None]
    return {name: fields for name, fields in found.items() if fields}


def rows() -> Iterator[tuple[list[str], set[str]]]:
    """Of the tables of fields: which messages a row is about, and the names in code style in it."""
    for line in (PROJECT / "docs/fields.md").read_text().splitlines():
        if line.startswith("|") and not line.startswith(("| Message |", "|---")):
            messages, text = line.removeprefix("| ").split(" | ", 1)
            yield messages.split(", "), set(re.findall(r"`(\w+)`", text))


def test_every_message_of_a_request_has_one_row() -> None:
    listed = [message for messages, _ in rows() for message in messages]
    assert sorted(listed) == sorted(requested())


@pytest.mark.parametrize(
    ("messages", "fields"), [pytest.param(*row, id=row[0][0]) for row in rows()]
)
def test_a_row_has_the_fields_of_its_messages(messages: list[str], fields: set[str]) -> None:
    contract = requested()
    assert fields == {field for message in messages for field in contract[message]}


def test_the_readme_has_every_call() -> None:
    text = (PROJECT / "README.md").read_text()
    listed = re.findall(r"^\| (\w+) \| (?:yes|not yet) \|$", text, re.MULTILINE)
    assert sorted(listed) == sorted(method.name for method in METHODS)
