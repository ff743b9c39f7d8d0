"""The cgroups of containers, open from their creation to their end, and the limits and usage of a pod's own."""

import msgspec

from nodeagent.cgroups import removals
from nodeagent.cgroups.group import Cgroup
from nodeagent.cgroups.manager import Cgroups
from nodeagent.cgroups.stats import CgroupStats
from nodeagent.errors import NotFound
from nodeagent.records import Container, Sandbox
from nodeagent.requests import Resources

USUAL_PERIOD_USEC = 100_000  # the kernel's


class Groups:
    """Container cgroups by their containers; each is opened once."""

    def __init__(self, cgroups: Cgroups) -> None:
        self._cgroups = cgroups
        self._open: dict[str, Cgroup] = {}

    def of(self, container: Container) -> Cgroup:
        """The container's cgroup, which exists from its creation to its end."""
        group = self._open.get(container.id)
        if group is None:
            group = self._cgroups.open_existing(container.cgroup_path)
            group.take_over_execs()
            self._open[container.id] = group
        return group

    def create(self, container: Container, resources: Resources) -> Cgroup:
        """Create the container's cgroup; `remove` undoes it, finished or not."""
        group = self._cgroups.create(container.cgroup_path, resources)
        self._open[container.id] = group
        return group

    def pod_stats(self, sandbox: Sandbox) -> CgroupStats:
        """The usage of the cgroup above a pod's containers. Raises NotFound: it is made with the first of them."""
        group = self._cgroups.open_existing(sandbox.cgroup_parent)
        try:
            return group.stats()
        finally:
            group.close()

    def limit_pod(self, sandbox: Sandbox) -> None:
        """Enforce a pod's own limits on the cgroup above its containers, which is made with the first of them.

        Raises NotFound for one that is the caller's to make.
        """
        if sandbox.config.resources is None:
            return
        try:
            group = self._cgroups.open_existing(sandbox.cgroup_parent)
        except NotFound:
            if sandbox.config.cgroup_parent:
                raise
            return
        group.apply(total(sandbox.config.resources, sandbox.config.overhead or Resources()))

    async def remove(self, container: Container) -> None:
        """Remove the container's cgroup and kill what is in it. Idempotent."""
        # It stays in the table until it is removed: otherwise `of` would open it again meanwhile, for good.
        try:
            group = self.of(container)
        except NotFound:
            await removals.in_thread(self._cgroups.end, container.cgroup_path)
            return
        await removals.in_thread(group.end)
        self._open.pop(container.id, None)

    async def remove_at(self, parent: str, container_id: str) -> None:
        """Remove the cgroup of a container without a record, if it is there."""
        path = self._cgroups.container_path(parent, container_id)
        await removals.in_thread(self._cgroups.end, path)


def total(resources: Resources, overhead: Resources) -> Resources:
    """The limits of a pod: the sum of its containers' and the overhead, where the containers have a limit."""
    period = resources.cpu_period_usec or USUAL_PERIOD_USEC
    quota = overhead.cpu_quota_usec * period // (overhead.cpu_period_usec or USUAL_PERIOD_USEC)
    more = {
        "cpu_quota_usec": quota,
        "cpu_shares": overhead.cpu_shares,
        "memory_limit_bytes": overhead.memory_limit_bytes,
    }
    added = {
        name: limit + max(0, more[name]) for name in more if (limit := getattr(resources, name)) > 0
    }
    return msgspec.structs.replace(resources, **added)
