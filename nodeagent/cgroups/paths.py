"""Paths of groups: those that a caller may give, and that of a container's own group.

A path begins with "/" at the mount point of its hierarchy, under both drivers.
"""

import os.path
import re

from nodeagent.errors import InvalidArgument

INNER = "container"
"""The name of a container's group on cgroup v2; it is below a group of the container's own that it does not see."""

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")
_MAX_NAME = 255


def check(path: str) -> str:
    """Return `path` without a final "/". Raises InvalidArgument unless it is absolute, clean and not the root."""
    names = path.rstrip("/").split("/")
    if names[0] or len(names) < 2:
        raise InvalidArgument(f'cgroup "{path}": not an absolute path below the root')
    for name in names[1:]:
        if name in ("", ".", "..") or len(name) > _MAX_NAME or not name.isprintable():
            raise InvalidArgument(f'cgroup "{path}": "{name}" cannot be a part of it')
    return "/".join(names)


def check_name(name: str) -> str:
    """Check the last part of a path, which the agent chooses."""
    if not _NAME.fullmatch(name) or len(name) > _MAX_NAME:
        raise InvalidArgument(f'cgroup: "{name}" cannot be a name')
    return name


def parent(path: str) -> str:
    """The path of a parent that a caller names, under the cgroupfs driver."""
    return check(path)


def container(parent: str, container_id: str) -> str:
    """The group of a container under the cgroupfs driver."""
    return f"{check(parent)}/{check_name(container_id)}"


def fence(path: str) -> str:
    """The group with the device rules of the container in group `path`: the one above it, if that is its own.

    A process with SYS_ADMIN or BPF can detach device programs from any group that it can open; of a container, that is
    its own group and those below.
    """
    above, name = os.path.split(path)
    return above if name == INNER else path


def pod(default_parent: str, pod_id: str) -> str:
    """The parent of the containers of a pod that comes without one, under the cgroupfs driver."""
    return f"{default_parent}/{check_name(pod_id)}"
