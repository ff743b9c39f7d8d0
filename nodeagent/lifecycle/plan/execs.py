"""Plans and cgroups of execs, for ExecSync and for streams."""

import secrets
from collections.abc import Sequence

from nodeagent.cgroups.group import Cgroup
from nodeagent.records import Container
from nodeagent.sandbox.spec import ExecPlan


def plan(
    container: Container, argv: Sequence[str], *, tty: bool = False, timeout_s: float = 0
) -> ExecPlan:
    """The plan of a command in a container. timeout_s 0 is no limit."""
    return ExecPlan(
        container=container.id,
        argv=list(argv),
        tty=tty,
        timeout_ms=round(timeout_s * 1000),
        # Not the plan's: UpdateContainerResources may have changed it since that was written.
        oom_score_adj=container.resources.oom_score_adj,
    )


def new_group(container: Cgroup) -> Cgroup:
    """A cgroup for one exec, below its container's; `Cgroup.discard` of the container's removes it.

    With a group of its own the whole tree can be killed, including what the command has left in the background.
    """
    return container.child(f"exec-{secrets.token_hex(4)}")
