"""What a successor must know of a pod itself, in ``pod.json`` of its directory."""

import json
from typing import TypedDict

from nodeagent import files
from nodeagent.sandbox import protocol
from nodeagent.sandbox.spec import PodPlan


class PodFacts(TypedDict):
    """The file's content. init_pid and init_ticks: of the first process of the shared PID namespace, 0 without one."""

    plan: PodPlan
    init_pid: int
    init_ticks: int


def save(known: PodFacts) -> None:
    text = protocol.to_json(known)
    files.write_atomic(_path(known["plan"]["directory"]), text, 0o600, sync=False)


def load(pod_id: str, directory: str) -> PodFacts:
    """The record of a pod; one without namespaces if its supervisor died before it wrote any, and so made nothing."""
    try:
        with open(_path(directory), "rb") as file:
            known: PodFacts = json.loads(file.read())
    except FileNotFoundError:
        plan: PodPlan = {"id": pod_id, "directory": directory, "namespaces": []}
        return {"plan": plan, "init_pid": 0, "init_ticks": 0}
    return known


def _path(directory: str) -> str:
    return f"{directory}/pod.json"
