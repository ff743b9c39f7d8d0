"""What the containers and execs of a pod have in common: the supervisor's loop, its children, its peers."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from nodeagent.errors import FailedPrecondition
from nodeagent.linux import syscalls
from nodeagent.sandbox import idmaps
from nodeagent.sandbox.protocol import Body
from nodeagent.sandbox.runtime.children import Children
from nodeagent.sandbox.runtime.launcher_link import LauncherLink
from nodeagent.sandbox.runtime.loop import Loop
from nodeagent.sandbox.runtime.peers import Peer
from nodeagent.sandbox.spec import PodPlan
from nodeagent.sandbox.supervisor import namespaces
from nodeagent.sandbox.supervisor.logs import Clock


class Pod:
    """A pod. agent: gets the events; init_pidfd: of the first process of the PID namespace that containers share.

    about_to_share: containers whose own PID namespaces others will join; once they have, it is the container's fact.
    userns: the pod's user namespace, -1 without one; root: its root's id on the node; groups: its map of groups.
    """

    def __init__(self, plan: PodPlan, loop: Loop, launcher: LauncherLink) -> None:
        self.id = plan["id"]
        self.directory = plan["directory"]
        self.namespaces = plan["namespaces"]
        self.userns = namespaces.user_namespace(plan["directory"])
        self.root, _ = idmaps.root_of(plan)
        self.groups = idmaps.groups_of(plan)
        self.loop = loop
        self.launcher = launcher
        self.children = Children(loop)
        self.clock = Clock()
        self.agent: Peer | None = None
        self.init_pidfd: int | None = None
        self.about_to_share: set[str] = set()
        self._pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)

    def tell(self, event: Body) -> None:
        """Send an event to the agent, if one is connected; the next one asks for the state."""
        if self.agent is not None:
            self.agent.send(event)

    @contextmanager
    def children_join(self, target: int | None) -> Iterator[None]:
        """Have children born in the PID namespace of the process of a pidfd; None is our own.

        Raises FailedPrecondition when that process has just ended.
        """
        if target is None:
            yield
            return
        try:
            # It moves children only, never the caller (pid_namespaces(7)).
            syscalls.setns(target, syscalls.CLONE_NEWPID)
        except ProcessLookupError:
            raise FailedPrecondition("the container whose processes are joined has ended") from None
        try:
            yield
        finally:
            syscalls.setns(self._pid_namespace, syscalls.CLONE_NEWPID)
