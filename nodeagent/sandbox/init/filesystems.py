"""New file systems of a container, detached: proc, sysfs, tmpfs, devpts and mqueue, with ids and labels of its own."""

from nodeagent.linux import mounts
from nodeagent.sandbox.idmaps import IdMaps
from nodeagent.sandbox.init import relabel
from nodeagent.sandbox.spec import Mount


def context(label: str) -> dict[str, str]:
    """The mount option by which all files of a new file system have the label of SELinux, if there is one."""
    return {"context": label} if label else {}


def make_filesystem(mount: Mount, maps: IdMaps) -> int:
    attributes = [name for name in mount["attributes"] if name != "ro"]
    data = mount["data"]
    if "gid" in data:
        data = {**data, "gid": str(maps.gid(int(data["gid"])))}
    if "label" not in mount:
        return mounts.make_filesystem(mount["source"], data, attributes)
    return _make_labelled(mount["source"], data, attributes, mount["label"])


def _make_labelled(kind: str, data: dict[str, str], attributes: list[str], label: str) -> int:
    """The new file system, with the label as a mount option, or given to its root if it is an mqueue.

    The mqueue of an IPC namespace is there already, and takes no label as an option.
    """
    if kind != "mqueue":
        return mounts.make_filesystem(kind, {**data, **context(label)}, attributes)
    tree = mounts.make_filesystem(kind, data, attributes)
    relabel.relabel_file(tree, label, "/dev/mqueue")
    return tree
