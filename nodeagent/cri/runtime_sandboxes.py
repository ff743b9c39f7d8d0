"""RuntimeService: the calls about pod sandboxes. The methods have the names of the RPCs."""
# ruff: noqa: N802

import time
from collections.abc import AsyncGenerator
from functools import partial

from nodeagent.api import runtime_pb2 as pb
from nodeagent.cri import listing, messages, validate, verbose
from nodeagent.cri.listing import Listing
from nodeagent.cri.translate_resources import overhead, pod_resources
from nodeagent.cri.translate_sandbox import sandbox_config
from nodeagent.lifecycle.node import Node
from nodeagent.records import Sandbox


class SandboxCalls:
    def __init__(self, node: Node) -> None:
        self._sandboxes = node.sandboxes
        self._containers = node.containers
        self._list = Listing(node.sandboxes.list, _item)

    async def RunPodSandbox(self, request: pb.RunPodSandboxRequest) -> pb.RunPodSandboxResponse:
        config = sandbox_config(request.config)
        handler = validate.text(request.runtime_handler, "runtime_handler")
        return pb.RunPodSandboxResponse(pod_sandbox_id=await self._sandboxes.run(config, handler))

    async def StopPodSandbox(self, request: pb.StopPodSandboxRequest) -> pb.StopPodSandboxResponse:
        await self._sandboxes.stop(sandbox_id(request.pod_sandbox_id))
        return pb.StopPodSandboxResponse()

    async def RemovePodSandbox(
        self, request: pb.RemovePodSandboxRequest
    ) -> pb.RemovePodSandboxResponse:
        await self._sandboxes.remove(sandbox_id(request.pod_sandbox_id))
        return pb.RemovePodSandboxResponse()

    async def PodSandboxStatus(
        self, request: pb.PodSandboxStatusRequest
    ) -> pb.PodSandboxStatusResponse:
        """Reply with the pod and its containers as they are at the same moment."""
        sandbox = self._sandboxes.get(sandbox_id(request.pod_sandbox_id))
        return pb.PodSandboxStatusResponse(
            status=messages.sandbox_status(sandbox),
            info=self._info(sandbox) if request.verbose else None,
            containers_statuses=map(messages.container_status, self._containers.of(sandbox.id)),
            timestamp=time.time_ns(),
        )

    def _info(self, sandbox: Sandbox) -> dict[str, str]:
        return verbose.sandbox_info(sandbox, self._sandboxes.verbose(sandbox.id))

    async def ListPodSandbox(self, request: pb.ListPodSandboxRequest) -> bytes:
        return self._list.reply(partial(listing.sandboxes, given=request.filter))

    async def StreamPodSandboxes(
        self, request: pb.StreamPodSandboxesRequest
    ) -> AsyncGenerator[bytes, None]:
        for part in self._list.stream(partial(listing.sandboxes, given=request.filter)):
            yield part

    async def UpdatePodSandboxResources(
        self, request: pb.UpdatePodSandboxResourcesRequest
    ) -> pb.UpdatePodSandboxResourcesResponse:
        """Update overhead and resources; a message that is absent changes nothing."""
        await self._sandboxes.update_resources(
            sandbox_id(request.pod_sandbox_id),
            overhead(request.overhead, "overhead") if request.HasField("overhead") else None,
            pod_resources(request.resources, "resources")
            if request.HasField("resources")
            else None,
        )
        return pb.UpdatePodSandboxResourcesResponse()


def sandbox_id(value: str) -> str:
    return validate.given(value, "pod_sandbox_id")


def _item(record: Sandbox) -> bytes:
    return messages.sandbox_item(record).SerializeToString()
