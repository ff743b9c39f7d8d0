"""Which files of a container get its SELinux label. Pure.

What is made for the container is mounted with it: its root, the small file systems of ours, image volumes. What is
there already is given it where the request says so, and where it is the pod's own. procfs, sysfs and cgroups have
the labels of the node's policy; a file system of the node that nobody asks to relabel keeps its own.
"""

from pathlib import Path

from nodeagent.requests import ContainerConfig
from nodeagent.sandbox.spec import ContainerPlan, Mount

_OWN_FILESYSTEMS = frozenset(("tmpfs", "devpts", "mqueue"))


def assign(plan: ContainerPlan, config: ContainerConfig, shared: Path, label: str) -> None:
    """Write the label into a plan that is otherwise complete. shared: where the pod's own files are."""
    # The later of two mounts on one path is there, and says whether it is relabelled.
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
