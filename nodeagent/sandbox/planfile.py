"""The plan of a container on disk: ``containers/<id>/plan.json`` in the directory of its pod.

It is written once, by the supervisor that makes the container. A successor reads it, and so does the agent, to show it.
It is on tmpfs: after a reboot, nothing runs that it could describe.
"""

from typing import Any, cast

from nodeagent.sandbox import paths, statefile
from nodeagent.sandbox.spec import ContainerPlan

VERSION = 1


def save(pod: str, plan: ContainerPlan) -> None:
    """Write the plan. pod: the directory of the pod, in which that of the container exists."""
    statefile.save(_path(pod, plan["id"]), VERSION, cast(dict[str, Any], plan))


def load(pod: str, container: str) -> ContainerPlan:
    """Read the plan. Raises as `statefile.load`."""
    return statefile.load(_path(pod, container), VERSION, ContainerPlan)


def _path(pod: str, container: str) -> str:
    return f"{paths.container(pod, container)}/plan.json"
