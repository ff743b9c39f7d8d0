"""Names, numbers and masks of capabilities."""

from pathlib import Path

import pytest

from nodeagent.linux import capabilities, syscalls


def test_masks_of_names() -> None:
    assert capabilities.mask([]) == 0
    assert capabilities.mask(["CHOWN", "cap_dac_override", "CAP_BPF"]) == 1 | 2 | 1 << 39


@pytest.mark.parametrize("name", ["", "ALL", "CAP_", "NO_SUCH", "CAP_CAP_CHOWN"])
def test_unknown_names_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown capability '{name}'"):
        capabilities.mask([name])


def test_names_of_masks() -> None:
    assert capabilities.names(1 | 1 << 40 | 1 << 63) == ["CHOWN", "CHECKPOINT_RESTORE"]
    assert capabilities.mask(capabilities.names(0b1011)) == 0b1011


def test_the_kernels_own_number_of_them() -> None:
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    assert capabilities.last() == last
    assert capabilities.known() == 2 ** (last + 1) - 1


def test_sets_of_this_process() -> None:
    status = Path("/proc/self/status").read_text()
    effective, permitted, inheritable = syscalls.capget()
    for name, found in (("CapEff", effective), ("CapPrm", permitted), ("CapInh", inheritable)):
        assert int(status.split(f"{name}:")[1].split()[0], 16) == found
