"""The cgroups of a kubelet that uses the systemd driver: slices, which it lets systemd make, as transient units.

The names are those of its cgroup manager (ToSystemd of k8s.io/kubernetes/pkg/kubelet/cm), what systemd is asked for is
what its library asks (github.com/opencontainers/cgroups/systemd).
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from nodeagent.cgroups import systemd

CGROUPS = Path("/sys/fs/cgroup")
SECONDS = 60

# name, signature and value of each
_PROPERTIES = (
    "DefaultDependencies b false "
    "MemoryAccounting b true CPUAccounting b true IOAccounting b true TasksAccounting b true"
).split()
_MANAGER = "org.freedesktop.systemd1 /org/freedesktop/systemd1 org.freedesktop.systemd1.Manager"
_METHOD = "StartTransientUnit ssa(sv)a(sa(sv))"


def are_used() -> bool:
    """Whether an agent with the driver "auto" uses systemd here: the init of a machine with cgroup v2."""
    return (CGROUPS / "cgroup.controllers").exists() and systemd.manages_node()


def place(cgroup: str) -> str:
    """The path of a cgroup as a kubelet calls it here: `/a/b`, or the slice that stands for it."""
    return path(cgroup) if are_used() else cgroup


def path(cgroup: str) -> str:
    """The slice that stands for a cgroup: of `/a-b/c` it is `/a_b.slice/a_b-c.slice`."""
    name = "-".join(part.replace("-", "_") for part in cgroup.strip("/").split("/"))
    return systemd.expand_slice(f"/{name}.slice")


def start(slice_path: str) -> None:
    """Let systemd make a slice, and those above it. Nothing happens to one that is there."""
    name = slice_path.rpartition("/")[2]
    if (CGROUPS / slice_path.strip("/")).exists():
        return
    properties = [str(len(_PROPERTIES) // 3), *_PROPERTIES]
    job = [*_MANAGER.split(), *_METHOD.split(), name, "replace", *properties, "0"]
    _call("busctl", "--quiet", "call", *job)
    _call("systemctl", "start", name)  # waits for the job of before


def keep_controllers(slice_path: str) -> None:
    """Let what is in a slice have every controller, which the kubelet wants of its root.

    systemd takes those away that no unit there needs, whoever has passed them on. A service that manages its own groups
    needs all that systemd knows; on a node the runtime's is one.
    """
    for controller in (CGROUPS / "cgroup.controllers").read_text().split():
        (CGROUPS / "cgroup.subtree_control").write_text(f"+{controller}")
    options = [f"--slice={slice_path.rpartition('/')[2]}", "--property=Delegate=yes", "--quiet"]
    _call("systemd-run", *options, "sleep", "infinity")


def stop(slice_path: str) -> None:
    """Let systemd end a slice, and those below it."""
    _call("systemctl", "stop", slice_path.rpartition("/")[2])


def _call(*command: str) -> None:
    subprocess.run(command, check=True, timeout=SECONDS)
