"""Kernel parameters of a pod, written by its supervisor from inside the namespaces that own them.

Which parameters may be set is decided by `nodeagent.linux.sysctls`, which is asked before. The path is walked below
/proc/sys, through no link and no other mount, and the file is written only if it is of procfs.
"""

import errno
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from nodeagent.errors import SHORTAGES, InvalidArgument, NodeAgentError, Unsupported
from nodeagent.linux import syscalls, userns
from nodeagent.linux.sysctls import owner_of, path_of
from nodeagent.linux.userns import Extent

_PING_GROUPS = "net/ipv4/ping_group_range"

# Safe in a pod's own network: any process may bind low ports and send pings.
DEFAULTS = {
    "net.ipv4.ip_unprivileged_port_start": "0",
    "net.ipv4.ping_group_range": "0 2147483647",
}

_ROOT = "/proc/sys"
_RESOLVE = (
    syscalls.RESOLVE_BENEATH
    | syscalls.RESOLVE_NO_SYMLINKS
    | syscalls.RESOLVE_NO_MAGICLINKS
    | syscalls.RESOLVE_NO_XDEV
)


def write(sysctls: Mapping[str, str], owner: int = 0, groups: Collection[Extent] = ()) -> None:
    """Write what `linux.sysctls.check` has let pass. Raises Unsupported for a name that this kernel does not have.

    owner: the root of the namespaces. For IPC the kernel requires the writer to be that, for UTS the node's root, and
    for networks it checks capabilities.
    groups: of the pod's user namespace; the writer is in the node's, so that ids of groups are translated.
    """
    if not sysctls:
        return
    root = os.open(_ROOT, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name, value in sysctls.items():
            with _acting_as(owner if owner_of(name) == "ipc" else 0):
                _write(root, name, _outside(name, value, groups))
    finally:
        os.close(root)


@contextmanager
def _acting_as(user: int) -> Iterator[None]:
    """Act as another user, with the capabilities that the process has."""
    if user == os.geteuid():
        yield
        return
    # Without it the effective set is cleared when the effective user is not 0 any more (capabilities(7)).
    syscalls.prctl(syscalls.PR_SET_SECUREBITS, syscalls.SECBIT_NO_SETUID_FIXUP)
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)
        syscalls.prctl(syscalls.PR_SET_SECUREBITS, 0)
        syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)  # a change of user sets it to fs.suid_dumpable


def _write(root: int, name: str, value: str) -> None:
    try:
        file = syscalls.openat2(root, path_of(name), os.O_WRONLY, resolve=_RESOLVE)
        try:
            if syscalls.statfs_type(file) != syscalls.PROC_SUPER_MAGIC:
                raise OSError(errno.EXDEV, "not a file of procfs", name)
            os.write(file, value.encode())
        finally:
            os.close(file)
    except OSError as error:
        raise _explained(error, name, value) from None


def _outside(name: str, value: str, groups: Collection[Extent]) -> str:
    """The value with the node's ids. One parameter of a pod consists of ids: the groups that may ping.

    A range is cut to the groups that are mapped: "0 2147483647" means all of them.
    """
    if not groups or path_of(name) != _PING_GROUPS:
        return value
    try:
        low, high = (int(number) for number in value.split())
    except ValueError:
        return value  # which the kernel refuses
    if high < low:  # no group
        return value
    last = max(extent.inside + extent.length - 1 for extent in groups)
    try:
        return f"{userns.outside(low, groups)} {userns.outside(min(high, last), groups)}"
    except ValueError:
        text = f'sysctl "{name}": group {low} is not mapped in the user namespace of the pod'
        raise InvalidArgument(text) from None


def _explained(error: OSError, name: str, value: str) -> NodeAgentError | OSError:
    if error.errno in SHORTAGES:
        return error
    if error.errno == errno.ENOENT:
        return Unsupported(f'sysctl "{name}": this kernel does not have it')
    if error.errno in (errno.EINVAL, errno.ERANGE):
        return InvalidArgument(f'sysctl "{name}": the kernel refuses the value "{value}"')
    if error.errno in (errno.EACCES, errno.EPERM):  # such as net.core.rmem_max
        return Unsupported(
            f'sysctl "{name}": the kernel lets no pod write it; if it holds for all networks, set it on the node'
        )
    return Unsupported(f'sysctl "{name}": {error.strerror}')
