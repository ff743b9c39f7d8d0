"""Volumes whose file system is a hostile server: what is at a path is not what was there a moment ago."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeagent.linux import mountinfo
from nodeagent.sandbox import rootfs_defaults
from tests.kernel.sandbox.conftest import Plan
from tests.kernel.sandbox.containers import Process, start
from tests.security.fuse import DIRECTORY, Node, link, serving
from tests.security.test_mount_targets import image, volume, with_mounts

__all__ = ["volume"]

ATTEMPTS = 12

pytestmark = pytest.mark.skipif(
    not os.path.exists("/dev/fuse"), reason="this kernel has no FUSE: the guest's, for one"
)


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A directory of the node that no container may reach, and that nothing is mounted on."""
    path = tmp_path / "outside"
    path.mkdir()
    (path / "precious").write_text("precious")
    before = mountinfo.table()
    yield path
    assert os.listdir(path) == ["precious"]
    assert [line for line in mountinfo.table().splitlines() if str(path) in line] == [
        line for line in before.splitlines() if str(path) in line
    ]


@pytest.fixture
def point(tmp_path: Path) -> Path:
    path = tmp_path / "fuse"
    path.mkdir()
    return path


def mounted(process: Process) -> set[str]:
    """The mount points of a container."""
    return {
        line.split(" ")[4]
        for line in Path(f"/proc/{process.pid}/mountinfo").read_text().splitlines()
    }


@pytest.mark.parametrize("where", ["outside", "climbing", "/proc/self/attr", "/proc/sys", "/dev"])
@pytest.mark.parametrize("kind", ["bind", "image"])
def test_a_mount_in_a_directory_that_is_a_link_at_times(
    plan: Plan, point: Path, outside: Path, volume: Path, where: str, kind: str
) -> None:
    """CVE-2021-30465, CVE-2021-25741, with a race that the attacker cannot lose."""
    places = {"outside": str(outside), "climbing": f"../../../../../../..{outside}"}
    turns = [DIRECTORY, DIRECTORY, link(places.get(where, where))]
    inner = rootfs_defaults.bind(str(volume), "/v/a/b", "ro", recursive=True)
    if kind == "image":
        inner = image("/v/a/b", volume)
    made = plan("true", mounts=with_mounts(rootfs_defaults.bind(str(point), "/v"), inner))
    usual = mounted_usually(plan)
    allowed = {"v", outside.parts[1], *(["dev"] if where == "/dev" else [])}
    seen = set()
    with serving(point, {"a": turns, "b": turns}):
        for _ in range(ATTEMPTS):
            with start(made) as process:
                seen.add(process.message.get("error", "ready"))
                if "ready" in process.message:
                    added = mounted(process) - usual
                    assert {path.split("/")[1] for path in added} <= allowed
    assert "ready" in seen
    assert seen <= {"ready", "OSError", "FailedPrecondition", "InvalidArgument"}


def mounted_usually(plan: Plan) -> set[str]:
    with start(plan("true")) as process:
        return mounted(process)


@pytest.mark.parametrize(
    "other",
    [Node(stat.S_IFIFO), Node(stat.S_IFCHR), Node(stat.S_IFBLK), DIRECTORY, link("/dev/zero")],
)
def test_a_passwd_that_is_something_else_at_times(plan: Plan, point: Path, other: Node) -> None:
    """Whatever it is, the creation ends, with the file or with an error that names it."""
    regular = Node(stat.S_IFREG | 0o644, size=100, endless=True)
    made = plan("true", mounts=with_mounts(rootfs_defaults.bind(str(point), "/etc")))
    with serving(point, {"passwd": [regular, other], "group": [regular]}):
        for _ in range(ATTEMPTS):
            with start(made) as process:
                if "error" in process.message:
                    assert process.message["error"] in ("InvalidArgument", "OSError")
                    assert "/etc/passwd" in process.message["text"]


def test_a_passwd_without_an_end(plan: Plan, point: Path) -> None:
    """No more is read than the size says, and no more is allowed than is read."""
    made = plan("true", mounts=with_mounts(rootfs_defaults.bind(str(point), "/etc")))
    for size, error in ((100, ""), (1 << 40, "larger than")):
        endless = Node(stat.S_IFREG | 0o644, size=size, endless=True)
        with serving(point, {"passwd": [endless], "group": [endless]}), start(made) as process:
            assert error in process.message.get("text", "")
            assert ("ready" in process.message) is (not error)


def test_a_working_directory_that_is_a_link_at_times(
    plan: Plan, point: Path, outside: Path
) -> None:
    turns = [DIRECTORY, link(f"../../../../../../..{outside}"), link("/proc/self/fd/3")]
    volume = rootfs_defaults.bind(str(point), "/v")
    made = plan(["/bin/ls"], mounts=with_mounts(volume), process={"cwd": "/v/a"})
    with serving(point, {"a": turns}):
        for _ in range(ATTEMPTS):
            with start(made) as process:
                if "ready" in process.message:
                    process.go()
                    assert "precious" not in process.output()
