"""Visibility of a pod's processes to one another, and which must be hidden until they have only the program's rights.

A process with CAP_SYS_PTRACE can take over whatever it sees in its PID namespace (ptrace(2), "Ptrace access mode
checking"): its memory, its descriptors and its rights. So what is prepared with the node's rights for a PID namespace
in which there is such a process, or may be one before the preparation is over, is prepared outside of it.

Nothing can be hidden in the node's own PID namespace: a container that is there and may trace owns the node, because it
may trace the agent.
"""

from collections.abc import Mapping
from typing import Protocol

from nodeagent.errors import FailedPrecondition
from nodeagent.linux import capabilities
from nodeagent.sandbox.facts import Facts
from nodeagent.sandbox.spec import ContainerPlan, ProcessPlan

# Names of PID namespaces that are not a single container's.
POD, NODE = "pod", "node"


class Member(Protocol):
    """A container of the pod."""

    plan: ContainerPlan
    facts: Facts


def namespace_of(member: Member) -> str:
    """POD, NODE, or the id of the container whose own PID namespace a container is in."""
    plan = member.plan
    mode = {"container": plan["id"], "target": plan["pid_target"]}.get(plan["pid"], plan["pid"])
    return member.facts.get("namespace", mode)


def must_hide_exec(members: Mapping[str, Member], container: Member) -> bool:
    """Whether a further process of a container is prepared outside of its PID namespace.

    In a namespace that was never shared, and without CAP_SYS_PTRACE, a process that is not dumpable cannot be traced.
    A namespace that others have joined counts as shared for good: processes that they have left may trace.
    """
    namespace = namespace_of(container)
    if namespace in (POD, NODE):
        return namespace == POD
    owner = members.get(namespace)
    return owner is None or owner.facts.get("shared", False) or _may_trace(owner)


def _may_trace(member: Member) -> bool:
    return bool(member.plan["process"]["capabilities"]["bounding"] & capabilities.SYS_PTRACE)


def require_successor(what: str, process: ProcessPlan, *, tty: bool) -> None:
    """Raise FailedPrecondition where the filter forbids what a hidden process has to call once it is in force."""
    spared = set() if tty else {"ioctl"}
    if process["no_new_privs"]:
        spared.add("capset")
    needed = [call for call in process.get("forbidden_calls", []) if call not in spared]
    if needed:
        raise FailedPrecondition(
            f"{what}: its seccomp profile forbids {', '.join(needed)}, without which no process can be started where"
            " another one may trace it; allow these calls, or have a PID namespace of its own without CAP_SYS_PTRACE"
        )
