"""RuntimeService: 37 calls, in parts by what they are about.

::

    runtime_node        Version, Status, RuntimeConfig, UpdateRuntimeConfig, GetContainerEvents, Checkpoint…, RestorePod
    runtime_sandboxes   RunPodSandbox, StopPodSandbox, … , ListPodSandbox, UpdatePodSandboxResources
    runtime_containers  CreateContainer, StartContainer, … , ListContainers, ReopenContainerLog, ExecSync
    runtime_streams     Exec, Attach, PortForward
    runtime_stats       ContainerStats, PodSandboxStats, their lists, ListMetricDescriptors, ListPodSandboxMetrics
"""

from nodeagent.cri.features import Features
from nodeagent.cri.runtime_containers import ContainerCalls
from nodeagent.cri.runtime_node import NodeCalls
from nodeagent.cri.runtime_sandboxes import SandboxCalls
from nodeagent.cri.runtime_stats import StatsCalls
from nodeagent.cri.runtime_streams import StreamCalls, Streaming
from nodeagent.lifecycle.node import Node


def runtime_service(
    node: Node, streaming: Streaming | None, features: Features
) -> tuple[object, ...]:
    """Objects that have, together, one method for each RPC."""
    return (
        NodeCalls(node, features),
        SandboxCalls(node),
        ContainerCalls(node),
        StreamCalls(node, streaming),
        StatsCalls(node),
    )
