"""The systemd driver: containers in slices, without calls to systemd.

systemd owns a slice and writes its ``cgroup.subtree_control``: at daemon-reload, or when a property is set, it takes
away every controller that none of its own units needs, and with it the limits of groups that it does not know. A unit
of its own for each container (a delegated scope) prevents that, at the price of a D-Bus call per start, of units that
fail or linger, and of device rules that a reload replaces.

The kernel prevents it as well: a group cannot give up a controller that one below it passes on (cgroup-v2.rst,
"Enabling and Disabling"; the write fails with EBUSY). On v2 the limits and the processes of a container are one level
below its group, whichever the driver (`paths.INNER`), and here that group looks like a scope::

    kubepods.slice / kubepods-pod1.slice / nodeagent-ID.scope           / container
    systemd's, or the kubelet's            passes on, device program      limits, processes
"""

import os

from nodeagent.cgroups import paths
from nodeagent.errors import InvalidArgument

_SUFFIX = ".slice"


def manages_node() -> bool:
    """Whether systemd is the init of this machine, as sd_booted(3) tells."""
    return os.path.isdir("/run/systemd/system")


def parent(path: str) -> str:
    """The path of the slice that a caller gives, by its name alone or its whole path."""
    return expand_slice(paths.check(path))


def container(parent: str, container_id: str) -> str:
    """The group of a container; `parent` is a slice."""
    return f"{expand_slice(paths.check(parent))}/nodeagent-{paths.check_name(container_id)}.scope"


def pod(default_parent: str, pod_id: str) -> str:
    """The slice for the containers of a pod that comes without one, in the slice `default_parent`."""
    name = os.path.basename(default_parent).removesuffix(_SUFFIX)
    return f"{default_parent}/{name}-{paths.check_name(pod_id)}{_SUFFIX}"


def as_slice(path: str) -> str:
    """The slice for a parent: ``/nodeagent-1`` becomes ``/nodeagent.slice/nodeagent-1.slice``."""
    return expand_slice(path if path.endswith(_SUFFIX) else path + _SUFFIX)


def expand_slice(path: str) -> str:
    """The whole path of a slice: ``/a-b.slice`` is ``/a.slice/a-b.slice`` (systemd.slice(5)).

    Takes the name alone, or the whole path. Raises InvalidArgument for what is not a slice, or is not where it belongs.
    """
    *above, name = path.split("/")[1:]
    stem = name.removesuffix(_SUFFIX)
    parts = stem.split("-")
    if stem == name or "" in parts:
        raise InvalidArgument(f'cgroup "{path}": not a slice, as the systemd driver needs')
    slices = ["-".join(parts[: depth + 1]) + _SUFFIX for depth in range(len(parts))]
    if above and above != slices[:-1]:
        raise InvalidArgument(f'cgroup "{path}": the slice "{name}" belongs to another place')
    return "/" + "/".join(slices)
