"""The cgroup of the process that holds the PID namespace which the containers of a pod share.

It is below the pod's, beside those of the containers. A container may be able to take that process over; so the cgroup
allows no devices and only one process.
"""

from nodeagent.cgroups import removals
from nodeagent.cgroups.group import Cgroup
from nodeagent.cgroups.manager import Cgroups
from nodeagent.records import Sandbox
from nodeagent.requests import Resources

# A supervisor's child shares its memory with it, and is charged only for what it writes: about 1 MiB.
LIMITS = Resources(cpu_shares=2, memory_limit_bytes=16 << 20, pids_limit=1)


def make(cgroups: Cgroups, sandbox: Sandbox) -> Cgroup:
    """Create the cgroup. Raises what `Cgroups.create` raises."""
    group = cgroups.create(cgroups.container_path(sandbox.cgroup_parent, sandbox.id), LIMITS)
    group.set_devices(())
    return group


async def remove(cgroups: Cgroups, sandbox: Sandbox) -> None:
    """Kill what is in it, and remove it. Idempotent, and nothing for a pod that shares no PID namespace."""
    if sandbox.config.namespaces.pid == "pod":
        await remove_below(cgroups, sandbox.cgroup_parent, sandbox.id)


async def remove_below(cgroups: Cgroups, parent: str, pod_id: str) -> None:
    """Remove the cgroup of a pod without a record, which may have had this parent."""
    await removals.in_thread(cgroups.end, cgroups.container_path(parent, pod_id))
