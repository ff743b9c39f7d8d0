"""The cgroups that a kubelet makes for its pods, below one of the test's own, in every hierarchy of the machine.

Where agents use the systemd driver they are slices, and systemd makes and ends them.
"""

from contextlib import suppress
from pathlib import Path

from tests.support import slices

TOP = Path("/sys/fs/cgroup")


def make(path: str) -> None:
    """Make a group, with the groups above; each may have limits of all controllers."""
    if slices.are_used():
        slices.start(path)
    for hierarchy in _hierarchies():
        group = hierarchy
        for name in path.strip("/").split("/"):
            _delegate(group)
            parent, group = group, group / name
            if not group.exists():
                group.mkdir()
                _inherit(parent, group)


def remove(path: str) -> None:
    """Remove a group with all that is below, where no process may be left."""
    if slices.are_used():
        slices.stop(path)
    for hierarchy in _hierarchies():
        top = hierarchy / path.strip("/")
        for group in sorted(top.rglob("*/"), key=lambda each: -len(each.parts)):
            group.rmdir()
        if top.exists():
            top.rmdir()


def _hierarchies() -> list[Path]:
    """Those of cgroup v1 where there are any: beside them the kubelet does not use cgroup2."""
    found: dict[str, list[Path]] = {"cgroup": [], "cgroup2": []}
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, kind, *_ = line.split()
        if kind in found and Path(point).is_relative_to(TOP):
            found[kind].append(Path(point))
    return found["cgroup"] or found["cgroup2"]


def _delegate(group: Path) -> None:
    with suppress(FileNotFoundError):
        for controller in (group / "cgroup.controllers").read_text().split():
            (group / "cgroup.subtree_control").write_text(f"+{controller}")


def _inherit(parent: Path, group: Path) -> None:
    """A new group of cgroup v1's cpuset has no processors and no memory."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        if (parent / name).exists() and not (parent / "cgroup.controllers").exists():
            (group / name).write_text((parent / name).read_text())
