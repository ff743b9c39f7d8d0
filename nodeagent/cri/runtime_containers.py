"""RuntimeService: the calls about containers. The methods have the names of the RPCs."""
# ruff: noqa: N802

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from functools import partial

from nodeagent.api import runtime_pb2 as pb
from nodeagent.cri import listing, messages, validate, verbose
from nodeagent.cri.listing import Listing
from nodeagent.cri.runtime_sandboxes import sandbox_id
from nodeagent.cri.translate_container import container_config
from nodeagent.cri.translate_resources import resources
from nodeagent.errors import Unsupported
from nodeagent.lifecycle.node import Node
from nodeagent.records import Container

log = logging.getLogger(__name__)

MAX_SECONDS = 1 << 31

# The kubelet and crictl receive 16 MiB a message; the rest is for the framing of its fields.
MAX_OUTPUT_BYTES = (16 << 20) - 64


class ContainerCalls:
    def __init__(self, node: Node) -> None:
        self._sandboxes = node.sandboxes
        self._containers = node.containers
        self._creation = node.creation
        self._stopping = node.stopping
        self._stats = node.stats
        self._list = Listing(node.containers.list, _item)

    async def CreateContainer(
        self, request: pb.CreateContainerRequest
    ) -> pb.CreateContainerResponse:
        """Create a container by the config that its pod was made with: the request's copy of that is ignored."""
        sandbox = self._sandboxes.get(sandbox_id(request.pod_sandbox_id))
        config = container_config(request.config, sandbox.config, sandbox.runtime_handler)
        return pb.CreateContainerResponse(
            container_id=await self._creation.create(sandbox.id, config)
        )

    async def StartContainer(self, request: pb.StartContainerRequest) -> pb.StartContainerResponse:
        await self._containers.start(container_id(request.container_id))
        return pb.StartContainerResponse()

    async def StopContainer(self, request: pb.StopContainerRequest) -> pb.StopContainerResponse:
        timeout = validate.number(request.timeout, "timeout", 0, MAX_SECONDS)
        await self._stopping.stop(container_id(request.container_id), timeout)
        return pb.StopContainerResponse()

    async def RemoveContainer(
        self, request: pb.RemoveContainerRequest
    ) -> pb.RemoveContainerResponse:
        await self._containers.remove(container_id(request.container_id))
        return pb.RemoveContainerResponse()

    async def ContainerStatus(
        self, request: pb.ContainerStatusRequest
    ) -> pb.ContainerStatusResponse:
        container = self._containers.get(container_id(request.container_id))
        return pb.ContainerStatusResponse(
            status=messages.container_status(container),
            info=await self._info(container) if request.verbose else None,
        )

    async def _info(self, container: Container) -> dict[str, str]:
        # What a filter does with each call takes a tenth of a second to find out: not on the event loop.
        plan = await asyncio.to_thread(self._containers.verbose, container.id)
        return verbose.container_info(container, plan, await self._stats.log(container))

    async def ListContainers(self, request: pb.ListContainersRequest) -> bytes:
        return self._list.reply(partial(listing.containers, given=request.filter))

    async def StreamContainers(
        self, request: pb.StreamContainersRequest
    ) -> AsyncGenerator[bytes, None]:
        for part in self._list.stream(partial(listing.containers, given=request.filter)):
            yield part

    async def UpdateContainerResources(
        self, request: pb.UpdateContainerResourcesRequest
    ) -> pb.UpdateContainerResourcesResponse:
        if request.HasField("windows"):
            raise Unsupported("windows: this is a Linux node")
        wanted = container_id(request.container_id)
        limits = resources(request.linux, "linux")
        if request.annotations:  # for plug-ins of other runtimes
            log.info('container "%s": the annotations of an update are ignored', wanted)
        await self._containers.update(wanted, limits)
        return pb.UpdateContainerResourcesResponse()

    async def ReopenContainerLog(
        self, request: pb.ReopenContainerLogRequest
    ) -> pb.ReopenContainerLogResponse:
        await self._containers.reopen_log(container_id(request.container_id))
        return pb.ReopenContainerLogResponse()

    async def ExecSync(self, request: pb.ExecSyncRequest) -> pb.ExecSyncResponse:
        """Run a command and reply with its output, cut to what a client can receive."""
        result = await self._containers.exec_sync(
            container_id(request.container_id),
            command(request.cmd),
            validate.number(request.timeout, "timeout", 0, MAX_SECONDS),
        )
        stdout, stderr = fit(result.stdout, result.stderr, MAX_OUTPUT_BYTES)
        return pb.ExecSyncResponse(stdout=stdout, stderr=stderr, exit_code=result.exit_code)


def container_id(value: str) -> str:
    return validate.given(value, "container_id")


def command(values: Sequence[str]) -> tuple[str, ...]:
    if not values:
        validate.refuse("cmd", "is required")
    return validate.strings(values, "cmd")


def fit(stdout: bytes, stderr: bytes, room: int) -> tuple[bytes, bytes]:
    """Cut both to fit together: each may have half of the room, and what the other does not use of its half."""
    half = room // 2
    for_stdout = max(half, room - len(stderr))
    for_stderr = max(room - half, room - len(stdout))
    return stdout[:for_stdout], stderr[:for_stderr]


def _item(record: Container) -> bytes:
    return messages.container_item(record).SerializeToString()
