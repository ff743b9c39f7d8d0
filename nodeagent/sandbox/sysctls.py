"""Kernel parameters of a pod, written by its supervisor from inside the namespaces that own them.

Only parameters that a namespace has for itself can be written: what else a name or a value says stays without effect
on the node (CVE-2022-0811). The path is walked below /proc/sys, through no link and no other mount, and the file is
written only if it is of procfs.
"""

import errno
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from nodeagent.errors import InvalidArgument, NodeAgentError, Unsupported
from nodeagent.linux import syscalls

# Safe in a pod's own network: any process may bind low ports and send pings.
DEFAULTS = {
    "net.ipv4.ip_unprivileged_port_start": "0",
    "net.ipv4.ping_group_range": "0 2147483647",
}

_OWNERS = (
    (re.compile(r"net\..+"), "net"),
    (re.compile(r"kernel\.(auto_msgmni|msg.*|sem|shm.*)"), "ipc"),
    (re.compile(r"kernel\.domainname"), "uts"),
    (re.compile(r"fs\.mqueue\..+"), "ipc"),
)
_PART = re.compile(r"[A-Za-z0-9_.@:-]{1,255}")
_VALUE = re.compile(r"[ -~\t]{0,1024}")
_ROOT = "/proc/sys"
_RESOLVE = (
    syscalls.RESOLVE_BENEATH
    | syscalls.RESOLVE_NO_SYMLINKS
    | syscalls.RESOLVE_NO_MAGICLINKS
    | syscalls.RESOLVE_NO_XDEV
)


def check(sysctls: Mapping[str, str], owned: Collection[str]) -> None:
    """Raises InvalidArgument for what is malformed, or is not of the namespaces that the pod owns."""
    for name, value in sysctls.items():
        parts = _parts(name)
        if any(not _PART.fullmatch(part) or part in (".", "..") for part in parts):
            raise InvalidArgument(f"sysctl {name!r}: not a name of a kernel parameter")
        if not any(
            pattern.fullmatch(".".join(parts)) and owner in owned for pattern, owner in _OWNERS
        ):
            raise InvalidArgument(f'sysctl "{name}": not of a namespace that the pod owns')
        if not _VALUE.fullmatch(value):
            raise InvalidArgument(
                f'sysctl "{name}": the value {value!r} is not printable, or too long'
            )


def write(sysctls: Mapping[str, str], owner: int = 0) -> None:
    """Write what `check` has let pass. Raises Unsupported for a name that this kernel does not have.

    owner: the root of the namespaces. Of IPC the kernel asks who writes, of networks what capabilities they have.
    """
    if not sysctls:
        return
    root = os.open(_ROOT, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with _acting_as(owner):
            for name, value in sysctls.items():
                _write(root, name, value)
    finally:
        os.close(root)


@contextmanager
def _acting_as(user: int) -> Iterator[None]:
    """Be somebody else, with the capabilities that we have."""
    if user == os.geteuid():
        yield
        return
    syscalls.prctl(syscalls.PR_SET_SECUREBITS, syscalls.SECBIT_NO_SETUID_FIXUP)
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)
        syscalls.prctl(syscalls.PR_SET_SECUREBITS, 0)
        syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)  # not what fs.suid_dumpable says


def _write(root: int, name: str, value: str) -> None:
    try:
        file = syscalls.openat2(root, "/".join(_parts(name)), os.O_WRONLY, resolve=_RESOLVE)
        try:
            if syscalls.statfs_type(file) != syscalls.PROC_SUPER_MAGIC:
                raise OSError(errno.EXDEV, "not a file of procfs", name)
            os.write(file, value.encode())
        finally:
            os.close(file)
    except OSError as error:
        raise _explained(error, name, value) from None


def _explained(error: OSError, name: str, value: str) -> NodeAgentError:
    if error.errno == errno.ENOENT:
        return Unsupported(f'sysctl "{name}": this kernel does not have it')
    if error.errno in (errno.EINVAL, errno.ERANGE):
        return InvalidArgument(f'sysctl "{name}": the kernel refuses the value "{value}"')
    return Unsupported(f'sysctl "{name}": {error.strerror}')


def _parts(name: str) -> list[str]:
    """Of ``net.ipv4.conf.eth0/1.forwarding``, where "/" stands for a dot in the name of an interface (sysctl(8))."""
    return [part.replace("/", ".") for part in name.split(".")]
