"""RuntimeService: the calls about the node itself. The methods have the names of the RPCs."""
# ruff: noqa: N802

from collections.abc import AsyncGenerator

from nodeagent.api import runtime_pb2 as pb
from nodeagent.cri import messages, verbose
from nodeagent.cri.features import Features
from nodeagent.errors import Unsupported
from nodeagent.lifecycle.events import Event
from nodeagent.lifecycle.node import Node, NodeStatus

CRI_VERSION = "0.1.0"  # what the kubelet asks for and insists on
RUNTIME_NAME = "nodeagent"
RUNTIME_API_VERSION = "v1"

_EVENTS = {
    "created": pb.CONTAINER_CREATED_EVENT,
    "started": pb.CONTAINER_STARTED_EVENT,
    "stopped": pb.CONTAINER_STOPPED_EVENT,
    "deleted": pb.CONTAINER_DELETED_EVENT,
}


class NodeCalls:
    def __init__(self, node: Node, features: Features) -> None:
        self._node = node
        self._features = features

    async def Version(self, request: pb.VersionRequest) -> pb.VersionResponse:
        return pb.VersionResponse(
            version=CRI_VERSION,
            runtime_name=RUNTIME_NAME,
            runtime_version=self._node.version,
            runtime_api_version=RUNTIME_API_VERSION,
        )

    async def Status(self, request: pb.StatusRequest) -> pb.StatusResponse:
        node, now = self._node, await self._node.status()
        runtime = pb.RuntimeCondition(
            type="RuntimeReady",
            status=now.runtime_ready,
            reason=now.runtime_reason,
            message=now.runtime_message,
        )
        network = pb.RuntimeCondition(
            type="NetworkReady",
            status=now.network_ready,
            reason=now.network_reason,
            message=now.network_message,
        )
        return pb.StatusResponse(
            status=pb.RuntimeStatus(conditions=[runtime, network]),
            info=self._info(now) if request.verbose else None,
            runtime_handlers=self._features.handlers(node.config.handlers),
            features=self._features.message(),
        )

    def _info(self, now: NodeStatus) -> dict[str, str]:
        node = self._node
        return verbose.node_info(node.config, node.version, now, node.tasks.failures.by_name)

    async def RuntimeConfig(self, request: pb.RuntimeConfigRequest) -> pb.RuntimeConfigResponse:
        driver = pb.SYSTEMD if self._node.cgroups.driver == "systemd" else pb.CGROUPFS
        return pb.RuntimeConfigResponse(linux=pb.LinuxRuntimeConfiguration(cgroup_driver=driver))

    async def UpdateRuntimeConfig(
        self, request: pb.UpdateRuntimeConfigRequest
    ) -> pb.UpdateRuntimeConfigResponse:
        await self._node.network.set_pod_cidr(request.runtime_config.network_config.pod_cidr)
        return pb.UpdateRuntimeConfigResponse()

    async def GetContainerEvents(
        self, request: pb.GetEventsRequest
    ) -> AsyncGenerator[pb.ContainerEventResponse, None]:
        """Stream the events from now on. A client that reads too slowly is cut off, so that it lists anew."""
        async with self._node.events.subscribe() as events:
            async for event in events:
                yield event_message(event)

    async def CheckpointContainer(self, request: pb.CheckpointContainerRequest) -> None:
        raise Unsupported("CheckpointContainer: this runtime takes no checkpoints")

    async def CheckpointPod(self, request: pb.CheckpointPodRequest) -> None:
        raise Unsupported("CheckpointPod: this runtime takes no checkpoints")

    async def RestorePod(self, request: pb.RestorePodRequest) -> None:
        raise Unsupported("RestorePod: this runtime takes no checkpoints")


def event_message(event: Event) -> pb.ContainerEventResponse:
    sandbox = event.sandbox
    return pb.ContainerEventResponse(
        container_id=event.object_id,
        container_event_type=_EVENTS[event.kind],
        created_at=event.at_ns,
        pod_sandbox_status=messages.sandbox_status(sandbox) if sandbox else None,
        containers_statuses=map(messages.container_status, event.containers),
    )
