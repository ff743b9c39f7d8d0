"""What the table of mounts says about a mount whose name tries to say something else."""

import os
from pathlib import Path

import pytest

from nodeagent.linux import mountinfo, mounts, syscalls


@pytest.mark.parametrize("name", ["a\u3000-\u3000proc", "a\r1b\x0bc\u2028d"])
def test_white_space_in_a_name(tmp_path: Path, name: str) -> None:
    directory = tmp_path / name
    directory.mkdir()
    syscalls.mount("tmpfs", str(directory), "tmpfs", 0, "")
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            assert mounts.filesystem_of(descriptor) == "tmpfs"
            assert mounts.propagation_of(descriptor) in ("private", "shared", "slave")
            assert str(directory) in [m.point for m in mountinfo.parse(mountinfo.table())]
        finally:
            os.close(descriptor)
    finally:
        syscalls.umount2(str(directory), syscalls.MNT_DETACH)


def test_a_label_is_one_option_of_an_overlay(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has a quote in it"):
        mounts.mount_overlay(str(tmp_path), [0], label='u:r:t:s0",lowerdir="/')
