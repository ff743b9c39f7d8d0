"""The default mounts, devices and links of a container's file system, as data.

The agent merges them with what a request asks for into a `ContainerPlan`; `nodeagent.sandbox.init.rootfs` executes it.
"""

from collections.abc import Mapping, Sequence

from nodeagent.sandbox.spec import Device, Mount
from nodeagent.words import Propagation


def filesystem(target: str, kind: str, attributes: str, **data: str) -> Mount:
    """The mount of a new file system; attributes are separated by blanks."""
    return {
        "kind": "fs",
        "target": target,
        "source": kind,
        "attributes": attributes.split(),
        "propagation": "private",
        "recursive": False,
        "data": data,
    }


def bind(
    source: str,
    target: str,
    *attributes: str,
    propagation: Propagation = "private",
    recursive: bool = False,
) -> Mount:
    """The mount of a host path, with all that is mounted below it."""
    return {
        "kind": "bind",
        "target": target,
        "source": source,
        "attributes": list(attributes),
        "propagation": propagation,
        "recursive": recursive,
        "data": {},
    }


def default_mounts(privileged: bool, hierarchies: Mapping[str, Sequence[str]]) -> list[Mount]:
    """The mounts of every container, parents first.

    hierarchies: of the node's cgroups, the name below /sys/fs/cgroup and the options of the mount, which are empty for
    cgroup2: ``{"": []}`` on a node with cgroup v2 only, ``{"cpu": ["cpu"], "systemd": ["name=systemd"]}`` with v1.
    """
    readonly = "" if privileged else "ro "
    return [
        filesystem("/proc", "proc", "nosuid nodev noexec"),
        filesystem("/dev", "tmpfs", "nosuid strictatime", mode="755", size="65536k"),
        filesystem(
            "/dev/pts",
            "devpts",
            "nosuid noexec",
            gid="5",
            mode="0620",
            ptmxmode="0666",
            newinstance="",
        ),
        filesystem("/dev/mqueue", "mqueue", "nosuid nodev noexec"),
        filesystem("/sys", "sysfs", f"{readonly}nosuid nodev noexec"),
        *_cgroup_mounts(f"{readonly}nosuid nodev noexec relatime", hierarchies),
    ]


def _cgroup_mounts(attributes: str, hierarchies: Mapping[str, Sequence[str]]) -> list[Mount]:
    top = "/sys/fs/cgroup"
    if "" in hierarchies:
        return [filesystem(top, "cgroup2", attributes)]
    return [filesystem(top, "tmpfs", attributes.replace("relatime", ""), mode="755")] + [
        filesystem(
            f"{top}/{name}", "cgroup" if options else "cgroup2", attributes, **_flags(options)
        )
        for name, options in hierarchies.items()
    ]


def _flags(options: Sequence[str]) -> dict[str, str]:
    """``["none", "name=systemd"]`` as a mount's data."""
    return {key: value for key, _, value in (option.partition("=") for option in options)}


def character_device(path: str, major: int, minor: int) -> Device:
    return {
        "path": path,
        "type": "c",
        "major": major,
        "minor": minor,
        "mode": 0o666,
        "uid": 0,
        "gid": 0,
    }


DEFAULT_DEVICES = (
    character_device("/dev/null", 1, 3),
    character_device("/dev/zero", 1, 5),
    character_device("/dev/full", 1, 7),
    character_device("/dev/random", 1, 8),
    character_device("/dev/urandom", 1, 9),
    character_device("/dev/tty", 5, 0),
)

DEFAULT_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
}

# Files of procfs that a request may cover: figures of the node that lxcfs, and its like, replace by the container's.
MOUNTABLE_IN_PROCFS = frozenset(
    f"/proc/{name}"
    for name in (
        "cpuinfo",
        "diskstats",
        "loadavg",
        "meminfo",
        "slabinfo",
        "stat",
        "swaps",
        "sys/crypto/fips_enabled",
        "sys/kernel/ns_last_pid",
        "uptime",
    )
)


def describe(mount: Mount) -> str:
    """The name of a mount in errors: ``proc on /proc``."""
    return f"{mount['source'] or 'image'} on {mount['target']}"
