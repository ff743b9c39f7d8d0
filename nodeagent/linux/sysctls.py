"""The kernel parameters that belong to a namespace, and may therefore be set for a pod.

The API refuses a name or a value by `check` when it reads a request, and so does the supervisor before it writes: both
ask this table. Any other parameter would change the node (CVE-2022-0811).
"""

import re
from collections.abc import Collection, Mapping

from nodeagent.errors import InvalidArgument

# Parameters by the namespace that has them for itself, as paths (ipc_namespaces(7), uts_namespaces(7)).
_OWNERS = (
    (re.compile(r"net/.+"), "net"),
    (
        re.compile(
            r"kernel/(auto_msgmni|msg_next_id|msgmax|msgmnb|msgmni|sem|sem_next_id|shm_next_id|shm_rmid_forced|shmall"
            r"|shmmax|shmmni)"
        ),
        "ipc",
    ),
    (re.compile(r"kernel/domainname"), "uts"),
    (re.compile(r"fs/mqueue/.+"), "ipc"),
)
_PART = re.compile(r"[A-Za-z0-9_.@:-]{1,255}")
_VALUE = re.compile(r"[ -~\t]{0,1024}\n?")  # a block of YAML ends with a newline


def check(sysctls: Mapping[str, str], owned: Collection[str]) -> None:
    """Raise InvalidArgument for what is malformed, or is not of the namespaces that the pod owns.

    owned: of "net", "ipc" and "uts", those that the pod does not share with the node.
    """
    for name, value in sysctls.items():
        if any(not _PART.fullmatch(part) or part in (".", "..") for part in _parts(name)):
            raise InvalidArgument(f"sysctl {name!r}: not a name of a kernel parameter")
        owner = owner_of(name)
        if owner is None:
            raise InvalidArgument(f'sysctl "{name}": is of the whole node, not of a namespace')
        if owner not in owned:
            raise InvalidArgument(f'sysctl "{name}": is of a namespace that the pod does not have')
        if not _VALUE.fullmatch(value):
            raise InvalidArgument(
                f'sysctl "{name}": the value {value!r} is not printable, or too long'
            )


def owner_of(name: str) -> str | None:
    """The kind of namespace that a parameter belongs to; None for one of the node."""
    path = path_of(name)
    return next((owner for pattern, owner in _OWNERS if pattern.fullmatch(path)), None)


def path_of(name: str) -> str:
    """The path of a parameter below /proc/sys."""
    return "/".join(_parts(name))


def _parts(name: str) -> list[str]:
    """The components of a name. Its first dot or slash tells which of both separates; the other stands for a dot.

    sysctl(8): ``net.ipv4.conf.eth0/1.forwarding`` and ``net/ipv4/conf/eth0.1/forwarding`` are the same.
    """
    first = next((character for character in name if character in "./"), ".")
    return [part.replace("/", ".") for part in name.split(first)]
