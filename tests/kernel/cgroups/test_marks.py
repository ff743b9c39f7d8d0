"""What tells the agent's groups from those of others, on directories in their place."""

import os
import time
from pathlib import Path

import pytest

from nodeagent.cgroups import tree
from nodeagent.errors import FailedPrecondition

FENCE = "/pod/id"
GROUP = f"{FENCE}/container"


@pytest.fixture
def mount(tmp_path: Path) -> str:
    tree.make(str(tmp_path), GROUP)
    return str(tmp_path)


def test_a_container_that_takes_its_mark_away_is_removed_all_the_same(mount: str) -> None:
    """Which takes SYS_ADMIN, and a group that it may write to; the one above is out of its sight."""
    os.removexattr(mount + GROUP, tree.MARK)
    tree.require_group(mount, GROUP, FENCE)
    tree.remove(mount, GROUP, FENCE, time.monotonic())
    assert not os.path.exists(mount + GROUP)


def test_what_others_made_is_refused(mount: str) -> None:
    os.removexattr(mount + GROUP, tree.MARK)
    with pytest.raises(FailedPrecondition, match="not made by this agent"):
        tree.remove(mount, GROUP, GROUP, time.monotonic())
    os.removexattr(mount + FENCE, tree.MARK)
    with pytest.raises(FailedPrecondition, match="not made by this agent"):
        tree.remove(mount, GROUP, FENCE, time.monotonic())
    assert os.path.isdir(mount + GROUP)
