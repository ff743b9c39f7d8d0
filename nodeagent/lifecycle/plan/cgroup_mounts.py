"""The mounts by which a container sees cgroups: its own or the node's, to read or to manage. Pure.

The default is a file system of its own group, read-only unless the container is privileged; a mount of the request at
the same place replaces it.
"""

import posixpath
from collections.abc import Sequence

from nodeagent.errors import InvalidArgument, Unsupported
from nodeagent.requests import ContainerConfig
from nodeagent.sandbox import rootfs_defaults
from nodeagent.sandbox.spec import Mount

PLACE = "/sys/fs/cgroup"
_FIELD = "config.linux.security_context.cgroup_mount_mode"


def is_delegated(config: ContainerConfig) -> bool:
    """Whether it manages its own groups without being privileged."""
    return config.cgroup_mount == "writable" and not config.privileged


def check(config: ContainerConfig, *, delegates: bool) -> None:
    """Raise Unsupported for what this node cannot provide; delegates: whether it has cgroup v2 with nsdelegate.

    Without nsdelegate a container's root could raise its own limits: only with it are the files of the namespace's root
    group read-only for the container (cgroup-v2.rst, "Model of Delegation").
    """
    if is_delegated(config) and not delegates:
        raise Unsupported(
            f"{_FIELD}: read-write needs cgroup v2 mounted with the option nsdelegate; remount it with this option"
        )


def requested(mounts: Sequence[Mount], config: ContainerConfig) -> list[Mount]:
    """The mounts of a container as it asks to see cgroups. Raises InvalidArgument where that cannot be."""
    places = [index for index, mount in enumerate(mounts) if _is_default(mount)]
    if not places:
        if is_delegated(config):
            raise InvalidArgument(
                f"{_FIELD}: read-write, but a mount of the request covers {PLACE}"
            )
        return list(mounts)
    if config.namespaces.cgroup == "node":
        others = [mount for mount in mounts if not _is_default(mount)]
        return [*others[: places[0]], _of_node(config), *others[places[0] :]]
    if is_delegated(config):
        return [_writable(mount) if _is_default(mount) else mount for mount in mounts]
    return list(mounts)


def _is_default(mount: Mount) -> bool:
    target = posixpath.normpath(mount["target"])
    return mount["kind"] == "fs" and (target == PLACE or target.startswith(f"{PLACE}/"))


def _of_node(config: ContainerConfig) -> Mount:
    """A bind of the node's own mount: a new mount in the node's cgroup namespace would set options for the node."""
    attributes = ["nosuid", "nodev", "noexec", "relatime"]
    if not config.privileged:
        attributes.append("ro")
    return rootfs_defaults.bind(PLACE, PLACE, *attributes, recursive=True)


def _writable(mount: Mount) -> Mount:
    return {**mount, "attributes": [name for name in mount["attributes"] if name != "ro"]}
