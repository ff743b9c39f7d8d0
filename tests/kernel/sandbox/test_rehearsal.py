"""What the launcher plays before its first fork: it is complete, leaves nothing, and is not needed."""

import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nodeagent.linux import syscalls
from nodeagent.sandbox.agent.client import Launcher
from tests.kernel.sandbox.supervised import Node, private_kib, running_node

PROJECT = Path(__file__).parents[3]
IMMORTAL_SINCE = (3, 12)
MAX_PRIVATE_KIB = 1100

# In an interpreter of its own: what it does to signals and children is the launcher's business.
SCRIPT = f"""
import gc, os, sys
sys.path.insert(0, {str(PROJECT)!r})
from nodeagent.sandbox.launcher.rehearsal import rehearse
rehearse(sys.argv[1])
gc.collect()
assert sys.argv[1] not in open("/proc/self/mountinfo").read()
try: print(os.waitpid(-1, os.WNOHANG))
except ChildProcessError: print("no child")
"""


def rehearse(directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-S", "-c", SCRIPT, str(directory)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_it_is_played_to_the_end_and_leaves_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "rehearsal"
    (directory / "left" / "by a launcher that was killed").mkdir(parents=True)
    played = rehearse(directory)
    assert (played.stdout, played.stderr) == ("no child\n", "")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_done_here_is_said(tmp_path: Path) -> None:
    """An overlay cannot be the upper directory of another."""
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    options = ",".join(f"{name}dir={tmp_path / name}" for name in ("lower", "upper", "work"))
    syscalls.mount("overlay", str(tmp_path / "merged"), "overlay", 0, options)
    try:
        played = rehearse(tmp_path / "merged" / "rehearsal")
        assert played.returncode != 0
        assert "OSError" in played.stderr
        assert list((tmp_path / "merged").iterdir()) == []
    finally:
        syscalls.umount2(str(tmp_path / "merged"), 0)


def test_one_that_does_not_end_is_given_up(tmp_path: Path) -> None:
    script = SCRIPT.replace(
        "import rehearse\n",
        "import rehearse; import nodeagent.sandbox.launcher.rehearsal as r; r._PATIENCE_MS = 0\n",
    )
    command = [sys.executable, "-I", "-S", "-c", script, str(tmp_path / "rehearsal")]
    played = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "TimeoutError: not over after 0 ms" in played.stderr
    assert list(tmp_path.iterdir()) == []


async def test_a_launcher_does_without(tmp_path: Path) -> None:
    directory = tmp_path / "pods/rehearsal"
    directory.mkdir(parents=True)
    syscalls.mount("busy", str(directory), "tmpfs", 0)
    try:
        launcher = await Launcher.connect_or_start(tmp_path)
        assert "no rehearsal" in (tmp_path / "launcher.log").read_text()
        assert await launcher.pods() == []
        await launcher.stop()
    finally:
        syscalls.umount2(str(directory), 0)


@pytest.fixture
async def node(tmp_path: Path, layer: Path) -> AsyncIterator[Node]:
    async with running_node(tmp_path, layer) as node:
        yield node


@pytest.mark.skipif(sys.version_info < IMMORTAL_SINCE, reason="its objects count references")
async def test_supervisors_share_what_it_was_good_for(node: Node) -> None:
    assert "no rehearsal" not in (node.state / "launcher.log").read_text()
    pods = [await node.pod() for _ in range(3)]
    for pod in pods:
        await pod.run("sleep 1000")
    assert max(private_kib(pod.supervisor.pid) for pod in pods) < MAX_PRIVATE_KIB
