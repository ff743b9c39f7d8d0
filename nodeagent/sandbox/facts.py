"""The state of a container in the pod's directory, for a successor of its supervisor.

In ``containers/<id>``, its plan (`planfile`) is written once, as the bundle of a container with hooks is, and
``state.json`` is replaced with every change. The directory is on tmpfs: what happened is not lost with the process, and
is void after a reboot anyway.
"""

import os
from typing import Any, NotRequired, TypedDict, cast

from nodeagent import files
from nodeagent.errors import IncompatibleVersion
from nodeagent.sandbox import bundle, exits, paths, planfile, statefile
from nodeagent.sandbox.spec import ContainerPlan, Identity

VERSION = 1  # of state.json

_MODE = 0o600


class Facts(TypedDict):
    """Times at which things happened are ns since the epoch, 0 for not yet.

    ticks: when the process started, as `process.start_ticks` tells it. deadline: ns of the monotonic clock, 0 for none.
    pipes: the inodes of stdin, stdout, stderr. oom_kills: the counter's value at the beginning. signalled: the stop
    signal was sent; killed: so was SIGKILL, by us. namespace: whose PID namespace it is in (`visibility`); shared:
    others have joined the one that is its own.
    """

    pid: int
    ticks: int
    pipes: dict[str, int]
    identity: Identity
    warnings: list[str]
    created_at: int
    started_at: int
    oom_kills: int
    signalled: bool
    killed: bool
    deadline: int
    namespace: NotRequired[str]
    shared: NotRequired[bool]


def make_directory(pod: str, plan: ContainerPlan) -> None:
    path = paths.container(pod, plan["id"])
    os.makedirs(path, mode=0o700)
    planfile.save(pod, plan)
    if "hooks" in plan:
        bundle.write_bundle(plan)
    exits.reserve(pod, plan["id"])


def save(pod: str, container: str, facts: Facts) -> None:
    statefile.save(_path(pod, container), VERSION, cast(dict[str, Any], facts))


def load(pod: str, container: str) -> Facts:
    """Read the facts. Raises FileNotFoundError for a container whose creation was cut off, else as `statefile.load`."""
    return statefile.load(_path(pod, container), VERSION, Facts)


def was_killed(pod: str, container: str) -> bool:
    """Whether a supervisor has sent SIGKILL, which it records before; False where nothing can be read."""
    try:
        return load(pod, container)["killed"]
    except (IncompatibleVersion, OSError, ValueError):
        return False


def open_journal(pod: str, container: str) -> int:
    path = f"{paths.container(pod, container)}/journal"
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _MODE)


def listed(pod: str) -> list[str]:
    """The ids of the containers that have a directory."""
    try:
        return os.listdir(f"{pod}/containers")
    except FileNotFoundError:
        return []


def remove(pod: str, container: str) -> None:
    """Remove the files of a container, the record of its end included."""
    files.remove_tree(paths.container(pod, container))
    exits.remove(pod, container)


def _path(pod: str, container: str) -> str:
    return f"{paths.container(pod, container)}/state.json"
