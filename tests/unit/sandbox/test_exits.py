"""Exit records that are not whole: nobody takes one for an end, and one that comes later is recorded."""

from pathlib import Path

import pytest

from nodeagent.sandbox import exits
from nodeagent.sandbox.spec import Exit

END: Exit = {"code": 7, "at": 1, "oom": False}
DAMAGED = [
    b"",
    b" " * 256,
    bytes(256),
    b"\xa5" * 256,
    b'{"code": 7, "at": 1',
    b"7",
    b"[]",
    b"{}",
    b'{"code": 7}',
    b'{"code": "7", "at": 1, "oom": false}',
    b'{"code": 7, "at": null, "oom": false}',
]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_record_is_no_end(tmp_path: Path, text: bytes) -> None:
    pod = str(tmp_path)
    exits.make_directory(pod)
    exits.reserve(pod, "c")
    (tmp_path / "exits/c.json").write_bytes(text)
    assert exits.read(pod, "c") is None
    assert exits.record(pod, "c", END) == END
    assert exits.read(pod, "c") == END
    assert exits.record(pod, "c", {**END, "code": 8}) == END
