"""The attributes that the kernel is given."""

import struct

import pytest

from nodeagent.linux import bpf


def test_a_query_has_room_for_all_that_the_kernel_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux 6.17 to 7.1 write bytes 56 to 63 even where the attributes are said to end before them."""
    given: list[bytes] = []

    def answer(command: int, attributes: bytes) -> tuple[int, bytes]:
        given.append(attributes)
        return 0, attributes

    monkeypatch.setattr(bpf, "_bpf", answer)
    bpf.prog_query(7)
    (attributes,) = given
    assert len(attributes) == 64
    assert struct.unpack_from("=II", attributes) == (7, 6)  # BPF_CGROUP_DEVICE
    assert attributes[32:] == bytes(32)
