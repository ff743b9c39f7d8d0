"""RuntimeService: the calls that reply with a URL to connect to. The methods have the names of the RPCs."""
# ruff: noqa: N802

from typing import Protocol

from nodeagent.api import runtime_pb2 as pb
from nodeagent.cri.runtime_containers import command, container_id
from nodeagent.cri.runtime_sandboxes import sandbox_id
from nodeagent.errors import FailedPrecondition, InvalidArgument, Unsupported
from nodeagent.lifecycle.node import Node
from nodeagent.records import Container
from nodeagent.streaming.backend import AttachRequest, ExecRequest, PortForwardRequest, Request


class Streaming(Protocol):
    """The server of exec, attach and port-forward."""

    def url(self, request: Request) -> str:
        """A URL at which a client gets what the request allows, once. Raises InvalidArgument, ResourceExhausted."""


class StreamCalls:
    """Exec, Attach and PortForward; without `streaming` each is refused."""

    def __init__(self, node: Node, streaming: Streaming | None) -> None:
        self._node = node
        self._streaming = streaming

    async def Exec(self, request: pb.ExecRequest) -> pb.ExecResponse:
        container = self._running(container_id(request.container_id))
        url = self._url(
            ExecRequest(
                container_id=container.id,
                command=command(request.cmd),
                tty=request.tty,
                stdin=request.stdin,
                stdout=request.stdout,
                stderr=request.stderr,
            )
        )
        return pb.ExecResponse(url=url)

    async def Attach(self, request: pb.AttachRequest) -> pb.AttachResponse:
        container = self._running(container_id(request.container_id))
        if request.tty != container.config.tty:
            raise InvalidArgument(f"tty: is {container.config.tty} in the container's config")
        if request.stdin and not container.config.stdin:
            raise InvalidArgument("stdin: the container was created without one")
        url = self._url(
            AttachRequest(
                container_id=container.id,
                tty=request.tty,
                stdin=request.stdin,
                stdout=request.stdout,
                stderr=request.stderr,
            )
        )
        return pb.AttachResponse(url=url)

    async def PortForward(self, request: pb.PortForwardRequest) -> pb.PortForwardResponse:
        sandbox = self._node.sandboxes.get(sandbox_id(request.pod_sandbox_id))
        if not sandbox.ready:
            raise FailedPrecondition(f'pod sandbox "{sandbox.id}": is stopped')
        url = self._url(PortForwardRequest(sandbox_id=sandbox.id, ports=tuple(request.port)))
        return pb.PortForwardResponse(url=url)

    def _running(self, name: str) -> Container:
        container = self._node.containers.get(name)
        if container.state != "running":
            raise FailedPrecondition(
                f'container "{container.id}": is {container.state}, not running'
            )
        return container

    def _url(self, request: Request) -> str:
        if self._streaming is None:
            raise Unsupported(f"{request.path}: this agent serves no streams")
        return self._streaming.url(request)
