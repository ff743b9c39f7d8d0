"""The node as the API sees it: its parts by what they do, and its two conditions."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from nodeagent.cgroups.manager import Cgroups
from nodeagent.config import Config
from nodeagent.images.catalog import Images
from nodeagent.images.profiles import SecurityProfiles
from nodeagent.lifecycle.containers.containers import Containers
from nodeagent.lifecycle.containers.creation import Creation
from nodeagent.lifecycle.containers.groups import Groups
from nodeagent.lifecycle.containers.stopping import Stopping
from nodeagent.lifecycle.events import Events
from nodeagent.lifecycle.health import Health
from nodeagent.lifecycle.places import Places
from nodeagent.lifecycle.pods.sandboxes import Sandboxes
from nodeagent.lifecycle.pods.slots import Slots
from nodeagent.lifecycle.reconcile import Reconciliation
from nodeagent.lifecycle.sessions import Sessions
from nodeagent.lifecycle.usage.stats import Stats
from nodeagent.net.network import Network
from nodeagent.tasks import Tasks


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatus:
    """The two conditions of the CRI. An empty reason belongs to a condition that holds.

    network_problems: further problems of the network, in either case. not_answering: why the supervisors of pods do not
    answer, by the pod's id; none of it makes the runtime unready.
    """

    runtime_ready: bool
    runtime_reason: str
    runtime_message: str
    network_ready: bool
    network_reason: str
    network_message: str
    network_problems: tuple[str, ...] = ()
    not_answering: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """The parts of the node that the API serves, by what they do."""

    config: Config
    places: Places
    version: str
    sandboxes: Sandboxes
    containers: Containers
    creation: Creation
    stopping: Stopping
    groups: Groups
    images: Images
    artifacts: SecurityProfiles
    stats: Stats
    events: Events
    sessions: Sessions
    slots: Slots
    network: Network
    cgroups: Cgroups
    health: Health
    reconciliation: Reconciliation
    tasks: Tasks

    async def status(self) -> NodeStatus:
        """The conditions, checked now and not cached; answers within a second or two, whatever hangs."""
        network = self.network.status()
        trouble = await self.health.trouble()
        return NodeStatus(
            runtime_ready=not trouble.reason,
            runtime_reason=trouble.reason,
            runtime_message=trouble.message,
            network_ready=network.ready,
            network_reason=network.reason,
            network_message=network.message or "; ".join(network.problems),
            network_problems=network.problems,
            not_answering=self.sandboxes.not_answering,
        )

    @property
    def busy(self) -> bool:
        """Whether a pod is READY, or may be: which is what an ending agent leaves behind."""
        return self.sandboxes.any_ready
