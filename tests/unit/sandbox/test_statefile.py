"""Files with a version: of before there were versions, of now, and of later."""

import json
from pathlib import Path
from typing import TypedDict

import pytest

from nodeagent.errors import IncompatibleVersion
from nodeagent.sandbox import statefile


class Kind(TypedDict):
    a: str


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "pod.json"
    statefile.save(str(path), 3, {"a": "\udc80"})
    assert json.loads(path.read_bytes()) == {"version": 3, "a": "\udc80"}
    assert path.stat().st_mode & 0o777 == 0o600
    assert (
        statefile.load(str(path), 3, Kind) == statefile.load(str(path), 4, Kind) == {"a": "\udc80"}
    )


def test_a_file_without_a_version_is_read(tmp_path: Path) -> None:
    path = tmp_path / "pod.json"
    path.write_text('{"a": "b", "c": 1}')
    assert statefile.load(str(path), 1, Kind) == {"a": "b", "c": 1}


def test_a_newer_file_is_refused_by_name_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "pod.json"
    path.write_text('{"version": 2, "a": 1}')
    with pytest.raises(
        IncompatibleVersion,
        match=rf"^{path}: version 2 is newer than 1, .*; install the release .* or stop and remove",
    ):
        statefile.load(str(path), 1, Kind)
    assert path.read_text() == '{"version": 2, "a": 1}'


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "7", "{}", '{"version": 1, "b": 1}']
    + [f'{{"a": "b", "version": {version}}}' for version in ('"2"', "null", "1.0", "-1")],
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "pod.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=str(path)):
        statefile.load(str(path), 1, Kind)
