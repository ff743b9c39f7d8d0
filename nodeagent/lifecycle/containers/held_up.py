"""What holds up a container that is being created or started, as far as /proc shows it."""

from nodeagent.cgroups.group import Cgroup
from nodeagent.errors import NodeAgentError
from nodeagent.linux import waiting
from nodeagent.sandbox.agent.client import Supervisor


def why(supervisor: Supervisor, group: Cgroup) -> str:
    """The supervisor that does not answer, or the first process that stands still; "" where neither is so.

    group: the container's, in which only its first process is, and hooks.
    """
    if supervisor.silent:
        return supervisor.silent
    try:
        pids = group.processes()
    except (NodeAgentError, OSError):  # it has ended, and its group was removed
        return ""
    found = (f"process {pid}: {text}" for pid in pids if (text := waiting.held_up(pid)))
    return next(found, "")
