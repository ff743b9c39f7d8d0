"""Names of groups: which paths a caller may give, and where a container's own group is.

A path begins with "/" at the mount point of its hierarchy, under the systemd driver as well, where it shows the slices
from the outermost to the innermost: ``/kubepods.slice/kubepods-burstable.slice``.
"""

import re

from nodeagent.errors import InvalidArgument

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")
_MAX_NAME = 255


def check(path: str) -> str:
    """`path` without a last "/". Raises InvalidArgument for one that is not absolute and clean, and for the root."""
    names = path.rstrip("/").split("/")
    if names[0] or len(names) < 2:
        raise InvalidArgument(f'cgroup "{path}": not an absolute path below the root')
    for name in names[1:]:
        if name in ("", ".", "..") or len(name) > _MAX_NAME or not name.isprintable():
            raise InvalidArgument(f'cgroup "{path}": "{name}" cannot be a part of it')
    return "/".join(names)


def check_name(name: str) -> str:
    """A last part that the agent chooses."""
    if not _NAME.fullmatch(name) or len(name) > _MAX_NAME:
        raise InvalidArgument(f'cgroup: "{name}" cannot be a name')
    return name


def container(parent: str, container_id: str) -> str:
    """The group of a container under the cgroupfs driver."""
    return f"{check(parent)}/{check_name(container_id)}"


def scope(parent: str, container_id: str) -> str:
    """The group of a container under the systemd driver; `parent` is a slice."""
    return f"{expand_slice(check(parent))}/nodeagent-{check_name(container_id)}.scope"


def expand_slice(path: str) -> str:
    """The whole path of a slice: ``/a-b.slice`` is ``/a.slice/a-b.slice`` (systemd.slice(5)).

    Takes the name alone, or the whole path. Raises InvalidArgument for what is not a slice, or is not where it belongs.
    """
    *above, name = path.split("/")[1:]
    stem = name.removesuffix(".slice")
    parts = stem.split("-")
    if stem == name or "" in parts:
        raise InvalidArgument(
            f'cgroup "{path}": not the path of a slice, as the systemd driver needs'
        )
    slices = ["-".join(parts[: depth + 1]) + ".slice" for depth in range(len(parts))]
    if above and above != slices[:-1]:
        raise InvalidArgument(
            f'cgroup "{path}": the slice "{name}" belongs to /{"/".join(slices[:-1])}'
        )
    return "/" + "/".join(slices)
