"""What a successor must know of a pod itself, in ``pod.json`` of its directory."""

import os
from typing import Any, TypedDict, cast

from nodeagent.sandbox import protocol, statefile
from nodeagent.sandbox.spec import PodPlan

VERSION = 1


class PodFacts(TypedDict):
    """The file's content. init_pid and init_ticks: of the first process of the shared PID namespace, 0 without one."""

    plan: PodPlan
    init_pid: int
    init_ticks: int


def save(known: PodFacts) -> None:
    statefile.save(_path(known["plan"]["directory"]), VERSION, cast(dict[str, Any], known))


def load(pod_id: str, directory: str) -> PodFacts:
    """A pod whose supervisor died before it wrote anything has nothing. Raises as `statefile.load` otherwise."""
    try:
        known = statefile.load(_path(directory), VERSION, PodFacts)
        protocol.checked(PodPlan, known["plan"])
        return known
    except FileNotFoundError:
        # The file is written before the namespaces are made: without them there is nothing that it could tell.
        if os.path.isdir(f"{directory}/ns"):
            raise ValueError(
                f"{_path(directory)}: is not there, but the pod has namespaces"
            ) from None
        plan: PodPlan = {"id": pod_id, "directory": directory, "namespaces": []}
        return {"plan": plan, "init_pid": 0, "init_ticks": 0}


def _path(directory: str) -> str:
    return f"{directory}/pod.json"
