"""Probes of what the kernel and the machine can do, by trying; nothing is left of a trial.

The agent reports the results as its features, `nodeagent check` and `nodeagent check --pod` to an operator.
"""

import os
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

from nodeagent.linux import capabilities, libseccomp, mounts, syscalls, userns
from nodeagent.linux.userns import Extent
from nodeagent.net import nftables
from nodeagent.net.declared import Declaration
from nodeagent.net.nftables import Table
from nodeagent.net.ruleset import Ruleset

MAPPED_LAYERS_KERNEL = (5, 19)  # overlayfs takes idmapped lower layers
# without it limits above our own cannot be given
SYS_RESOURCE = 1 << capabilities.NAMES.index("SYS_RESOURCE")
HOST_PORTS = Ruleset(
    table=Table("nodeagent_check"),
    bridge="na",
    subnets=(IPv4Network("0.0.0.0/0"), IPv6Network("::/0")),
    masquerade=True,
    host_ports=True,
)


def kernel_version(release: str) -> tuple[int, int]:
    major, minor, *_ = release.split(".")
    return int(major), int("".join(c for c in minor if c.isdigit()))


def has_seccomp() -> bool:
    return "errno" in _read("/proc/sys/kernel/seccomp/actions_avail").split()


def compiles_filters() -> bool:
    """Whether seccomp profiles can be compiled, and the kernel accepts the result."""
    try:
        return libseccomp.number_of("read") is not None and has_seccomp()
    except OSError:
        return False


def maps_ids(root: Path) -> bool:
    """Whether pods can have user namespaces, which needs idmapped mounts of the layers below `root`.

    Raises OSError where the kernel or the file system refuses.
    """
    directory = next(path for path in (root, *root.parents) if path.is_dir())
    extents = [Extent(0, 1 << 16, 1 << 16)]
    made = userns.create(extents, extents)[syscalls.CLONE_NEWUSER]
    try:
        tree = syscalls.open_tree(syscalls.AT_FDCWD, str(directory), syscalls.OPEN_TREE_CLONE)
        try:
            mounts.map_ids(tree, made, recursive=False)
        finally:
            os.close(tree)
    finally:
        os.close(made)
    return kernel_version(os.uname().release) >= MAPPED_LAYERS_KERNEL


def forwards_ports() -> bool:
    """Whether the kernel can publish ports of pods on the node."""
    try:
        return takes(HOST_PORTS)
    except OSError:
        return False


def takes(declaration: Declaration) -> bool:
    """Whether the kernel would accept a table, which is not made. Raises OSError where it refuses."""
    with nftables.connect() as connection:
        nftables.try_out(connection, declaration.declare([]))
    return True


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
