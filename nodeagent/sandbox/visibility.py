"""Which processes of a pod can see one another, and who of them must be hidden until it is no more than its program.

A process with CAP_SYS_PTRACE takes over whatever it sees in its PID namespace (ptrace(2), "Ptrace access mode
checking"): its memory, its descriptors and its rights. So what is prepared with the node's rights for a PID namespace
in which there is such a process, or may be one before the preparation is over, is prepared outside of it.

Nothing can be hidden in the node's own PID namespace: a container that is there and may trace owns the node, because it
may trace the agent.
"""

from collections.abc import Mapping
from typing import Protocol

from nodeagent.errors import FailedPrecondition
from nodeagent.linux import capabilities
from nodeagent.sandbox.spec import ContainerPlan, Exit, ProcessPlan

# Names of PID namespaces that are not a single container's.
POD, NODE = "pod", "node"


class Member(Protocol):
    """A container of the pod."""

    plan: ContainerPlan
    exit: Exit | None


def pid_namespace(family: Mapping[str, Member], plan: ContainerPlan) -> str:
    """POD, NODE, or the id of the container whose own PID namespace a container is in."""
    if plan["pid"] != "target":
        return plan["id"] if plan["pid"] == "container" else plan["pid"]
    target = family.get(plan["pid_target"])
    return pid_namespace(family, target.plan) if target else plan["pid_target"]


def must_hide_exec(family: Mapping[str, Member], container: ContainerPlan) -> bool:
    """Whether a further process of a container is prepared out of sight.

    In a namespace of its own without CAP_SYS_PTRACE nobody can do anything to a process that is not dumpable.
    """
    namespace = pid_namespace(family, container)
    if namespace == NODE:
        return False
    there = [
        member
        for member in family.values()
        if member.exit is None and pid_namespace(family, member.plan) == namespace
    ]
    return namespace == POD or len(there) > 1 or any(map(_may_trace, there))


def _may_trace(member: Member) -> bool:
    return bool(member.plan["process"]["capabilities"]["bounding"] & capabilities.SYS_PTRACE)


def require_successor(what: str, process: ProcessPlan, *, tty: bool) -> None:
    """Raises FailedPrecondition where the filter forbids what a hidden process has to call once it is in force."""
    spared = set() if tty else {"ioctl"}
    if process["no_new_privs"]:
        spared.add("capset")
    needed = [call for call in process.get("forbidden_calls", []) if call not in spared]
    if needed:
        raise FailedPrecondition(
            f"{what}: its seccomp profile forbids {', '.join(needed)}, which starts a process where others may trace"
            " it (a shared PID namespace, or CAP_SYS_PTRACE); allow that, or give both up"
        )
