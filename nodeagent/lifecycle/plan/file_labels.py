"""The choice of the files that get a container's SELinux label. Pure.

What is made for the container is mounted with the label: its root, small file systems of ours, image volumes. Existing
files are relabelled where the request says so, and where they are the pod's own. procfs, sysfs and cgroups have the
labels of the node's policy; a file system of the node that nobody asks to relabel keeps its own.
"""

from pathlib import Path

from nodeagent.requests import ContainerConfig
from nodeagent.sandbox.spec import ContainerPlan, Mount

_OWN_FILESYSTEMS = frozenset(("tmpfs", "devpts", "mqueue"))


def assign(plan: ContainerPlan, config: ContainerConfig, shared: Path, label: str) -> None:
    """Write the label into a plan that is otherwise complete. shared: where the pod's own files are."""
    # Of two mounts on one path the later one is made, and it decides.
    asked = {mount.container_path: mount.selinux_relabel for mount in config.mounts}
    plan["rootfs"]["label"] = label
    for volume in plan.get("volumes", []):
        volume["label"] = label
    for mount in plan["mounts"]:
        if _is_labelled(mount, shared) or asked.get(mount["target"]):
            mount["label"] = label


def _is_labelled(mount: Mount, shared: Path) -> bool:
    if mount["kind"] == "bind":
        return mount["source"].startswith(f"{shared}/")
    return mount["kind"] == "image" or mount["source"] in _OWN_FILESYSTEMS
