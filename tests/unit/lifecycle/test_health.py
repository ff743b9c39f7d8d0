"""RuntimeReady: what is found, within a bound, and said once."""

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nodeagent.lifecycle import health
from nodeagent.lifecycle.health import NONE, Health
from nodeagent.tasks import Tasks


class Node:
    """What the condition is made of, at will."""

    def __init__(self, folder: Path) -> None:
        self.root, self.pods = folder / "lib", folder / "run/pods"
        for directory in (self.root, self.pods):
            directory.mkdir(parents=True)
        self.launchers = SimpleNamespace(trouble="")
        self.failure = self.mount = ""
        self.blocked: threading.Event | None = None
        self.health = Health(*cast(Any, (self, self, self.launchers, self, Tasks())))

    def trouble(self) -> str:
        return self.failure

    def covered(self) -> str:
        if self.blocked is not None:
            self.blocked.wait()
        return self.mount


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    if node.blocked is not None:
        node.blocked.set()


async def test_all_is_well(node: Node) -> None:
    assert await node.health.trouble() == NONE


async def test_what_is_wrong_has_a_reason_until_it_is_over(
    node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    node.mount = "/sys/fs/cgroup"
    for _ in range(2):
        found = await node.health.trouble()
        assert found.reason == "CgroupRootCovered"
        assert found.message.startswith("/sys/fs/cgroup: another mount covers")
    node.mount = ""
    assert await node.health.trouble() == NONE
    node.launchers.trouble = "no memory"
    assert await node.health.trouble() == ("LauncherGone", "no launcher: no memory")
    node.launchers.trouble, node.failure = "", "state.db: disk I/O error"
    assert await node.health.trouble() == ("StoreNotWritable", "state.db: disk I/O error")
    node.failure = ""
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_RDONLY))
        found = await node.health.trouble()
    assert (found.reason, found.message.split(":")[0]) == ("ReadOnly", str(node.root))
    assert await node.health.trouble() == NONE
    said = [message.split(":")[1].strip() for message in caplog.messages]
    assert said == ["false", "true again", "false", "false", "false", "true again"]


async def test_cgroups_that_cannot_be_looked_at_are_not_covered(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> str:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/sys/fs/cgroup")

    monkeypatch.setattr(node, "covered", fail)
    found = await node.health.trouble()
    assert found.reason == "CgroupsUnreadable"
    assert "Too many open files: '/sys/fs/cgroup'" in found.message


async def test_a_directory_that_is_not_the_one_that_the_agent_has(node: Node) -> None:
    node.root.rename(node.root.with_name("other"))
    assert (await node.health.trouble()).reason == "DirectoryGone"
    node.root.mkdir()
    assert (await node.health.trouble()).reason == "DirectoryReplaced"


async def test_a_look_that_does_not_return_holds_nobody_up(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And there is one of it, however often the kubelet asks."""
    monkeypatch.setattr(health, "LOOK_SECONDS", 0.01)
    node.blocked = threading.Event()
    for _ in range(3):  # a machine may be busy
        assert await node.health.trouble() == NONE
    monkeypatch.setattr(health, "HUNG_SECONDS", 0)
    for _ in range(3):
        assert (await node.health.trouble()).reason == "NotAnswering"
    # Each has a thread; but threads cannot be counted, as one of another test may end meanwhile.
    assert len(node.health._paths.under_way) == 1
    node.blocked.set()
    monkeypatch.setattr(health, "LOOK_SECONDS", 60)
    assert await node.health.trouble() == NONE
