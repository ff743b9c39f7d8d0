"""A running container swaps what is in a volume for links while its siblings are made.

The kind of CVE-2021-30465 and CVE-2021-25741: what a link leads to on the node is never mounted, nor mounted on.
"""

import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nodeagent.sandbox import rootfs_defaults
from nodeagent.sandbox.spec import Mount
from tests.kernel.sandbox.conftest import Plan
from tests.kernel.sandbox.containers import Process, container_plan, start
from tests.kernel.sandbox.test_init_mounts import shared
from tests.security.test_mount_targets import image, with_mounts
from tests.support.images import compiled

__all__ = ["shared"]

VICTIMS = 12

# Exchanges a directory and a link, in one step each time, for as long as it runs.
SWAP = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>
int main(void)
{
	const char *others[] = {"/v/outside", "/v/climbing", "/v/attr", "/v/sys", "/v/file", "/v/dangling"};
	write(1, "up", 2);
	for (unsigned i = 0;; i = (i + 1) % 6)
		for (int j = 0; j < 2; j++)
			renameat2(AT_FDCWD, "/v/a", AT_FDCWD, others[i], RENAME_EXCHANGE);
}
"""


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A directory of the node that no container may reach, and that nothing is mounted on."""
    path = tmp_path / "outside"
    (path / "b").mkdir(parents=True)
    (path / "precious").write_text("precious")
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    return path


@pytest.fixture
def attacker(tmp_path: Path, layer: Path, shared: Path, outside: Path) -> Iterator[Process]:
    """The attacker, with the volume, which is on a shared mount, at /v."""
    (shared / "a" / "b").mkdir(parents=True)
    (shared / "file").touch()
    links = {
        "outside": str(outside),
        "climbing": f"../../../../../../../..{outside}",
        "attr": "/proc/self/attr",
        "sys": "/proc/sys",
        "dangling": "/dangling",
    }
    for name, target in links.items():
        (shared / name).symlink_to(target)
    directory = tmp_path / "attacker"
    made = container_plan(
        directory, layer, ["/swap"], mounts=with_mounts(rootfs_defaults.bind(str(shared), "/v"))
    )
    (directory / "upper" / "swap").write_bytes(compiled(SWAP))
    (directory / "upper" / "swap").chmod(0o755)
    with start(made) as process:
        process.go()
        assert os.read(process.stdout, 2) == b"up"
        yield process


def end(process: Process) -> None:
    signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def mounted(pid: int | str) -> set[str]:
    with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        return {line.split(" ")[4] for line in table}


def on_node(folder: Path) -> set[str]:
    return {point for point in mounted("self") if point.startswith(f"{folder}/")}


def inner(kind: str, source: Path) -> tuple[Mount, Any]:
    """What is mounted inside of the volume, and the volume's own propagation."""
    if kind == "image":
        return image("/v/a/b", source), "private"
    if kind == "read-only":
        return rootfs_defaults.bind(str(source), "/v/a/b", "ro", recursive=True), "private"
    return rootfs_defaults.bind(str(source), "/v/a/b"), kind


@pytest.mark.parametrize("kind", ["private", "slave", "shared", "image", "read-only"])
def test_nothing_is_mounted_outside_of_the_volume(
    plan: Plan, attacker: Process, shared: Path, outside: Path, source: Path, kind: str
) -> None:
    """A link means what it means in the container; on the node, in procfs, and for the attacker, nothing changes."""
    added, propagation = inner(kind, source)
    volume = rootfs_defaults.bind(str(shared), "/v", propagation=propagation)
    made = plan(
        "true",
        mounts=with_mounts(volume, added),
        masked_paths=["/proc/keys", "/v/a/b"],
        readonly_paths=["/proc/sys", "/v/a/b"],
        process={"cwd": "/v/a"},
    )
    node, attackers = on_node(shared.parent), mounted(attacker.pid)
    with start(plan("true", masked_paths=["/proc/keys"], readonly_paths=["/proc/sys"])) as process:
        usual = mounted(process.pid)
    seen = set()
    for _ in range(VICTIMS):
        with start(made) as process:
            seen.add(process.message.get("error", "ready"))
            if "ready" in process.message:
                found = mounted(process.pid)
                assert usual <= found
                assert {path.split("/")[1] for path in found - usual} <= {
                    "v",
                    "dangling",
                    outside.parts[1],
                }
        assert on_node(shared.parent) == node
        assert mounted(attacker.pid) == attackers
        assert sorted(os.listdir(outside)) == ["b", "precious"]
    assert seen <= {"ready", "OSError", "InvalidArgument", "FailedPrecondition"}


def test_no_device_is_made_in_the_volume(
    plan: Plan, attacker: Process, shared: Path, outside: Path
) -> None:
    devices = [rootfs_defaults.character_device("/v/a/device", 1, 5)]
    made = plan(
        "true", mounts=with_mounts(rootfs_defaults.bind(str(shared), "/v")), devices=devices
    )
    for _ in range(VICTIMS):
        with start(made) as process:
            assert process.message["error"] == "InvalidArgument", process.message
    end(attacker)  # or a directory becomes a link to the node's while it is read
    kinds = {stat.S_IFMT(path.lstat().st_mode) for path in shared.rglob("*")}
    assert kinds <= {stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK}
    assert sorted(os.listdir(outside)) == ["b", "precious"]
    assert on_node(outside) == set()
