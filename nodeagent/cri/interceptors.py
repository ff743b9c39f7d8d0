"""What every call passes through: errors become status codes, each call is measured and has one line in the log.

A call that changes something is finished even if its client goes away. The log names objects, never contents: a request
may hold passwords and environments.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import Message

from nodeagent.cri import status
from nodeagent.tasks import Caller, Tasks, caller

log = logging.getLogger(__name__)

DRAIN_SECONDS = 5.0

# Lists are serialised already: see `nodeagent.cri.listing`.
Reply: TypeAlias = Message | bytes
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Observe: TypeAlias = Callable[[str, str, float], None]
"""Called at the end of each call: method, name of the status code, seconds."""

CHANGING = frozenset(
    {
        "RunPodSandbox",
        "StopPodSandbox",
        "RemovePodSandbox",
        "UpdatePodSandboxResources",
        "CreateContainer",
        "StartContainer",
        "StopContainer",
        "RemoveContainer",
        "UpdateContainerResources",
        "ReopenContainerLog",
        "UpdateRuntimeConfig",
        "RemoveImage",
        "RemoveSecurityProfile",
    }
)


class Calls:
    """Wraps the methods of a service for gRPC."""

    def __init__(self, observe: Observe, tasks: Tasks) -> None:
        self._observe = observe
        self._changes = tasks.part()
        self._warned: set[str] = set()

    def unary(
        self, method: str, behaviour: Callable[[Any], Coroutine[Any, Any, Reply]]
    ) -> Callable[[Message, Context], Awaitable[Reply]]:
        changing = method in CHANGING

        async def handle(request: Message, context: Context) -> Reply:
            async with self._guarded(method, request, context):
                if not changing:
                    return await behaviour(request)
                self._drop_unknown(method, request)
                waiting = Caller()
                caller.set(waiting)
                change = self._changes.start(
                    "rpc", behaviour(request), about=f"rpc={method}{_about(request)}"
                )
                return await _finish(method, change, waiting)

        return handle

    def stream(
        self, method: str, behaviour: Callable[[Any], AsyncGenerator[Reply, None]]
    ) -> Callable[[Message, Context], Awaitable[None]]:
        async def handle(request: Message, context: Context) -> None:
            async with (
                self._guarded(method, request, context),
                aclosing(behaviour(request)) as replies,
            ):
                async for reply in replies:
                    await context.write(reply)

        return handle

    @asynccontextmanager
    async def _guarded(
        self, method: str, request: Message, context: Context
    ) -> AsyncGenerator[None, None]:
        call = _Call(method, request, self._observe)
        try:
            yield
        except asyncio.CancelledError:
            call.end(grpc.StatusCode.CANCELLED, logging.INFO, "the client went away")
            raise
        except Exception as error:  # noqa: BLE001, this is the one door
            code, details = status.code_of(error, method), status.details_of(error)
            defect = None if status.is_expected(error) else error
            call.end(code, logging.ERROR if defect else logging.INFO, details, defect)
            await context.abort(code, details)
        else:
            level = logging.INFO if method in CHANGING else logging.DEBUG
            call.end(grpc.StatusCode.OK, level)

    def _drop_unknown(self, method: str, request: Message) -> None:
        """Drop fields of a newer contract, as proto3 has it, and warn once for each method."""
        size = request.ByteSize()
        request.DiscardUnknownFields()
        if request.ByteSize() != size and method not in self._warned:
            self._warned.add(method)
            log.warning(
                "rpc=%s: the request has fields that this agent does not know; ignored", method
            )

    async def drain(self) -> None:
        """Wait for changes under way; those that take longer than DRAIN_SECONDS are cancelled, and undo themselves."""
        await self._changes.settled(DRAIN_SECONDS)
        await self._changes.close()


async def _finish(method: str, task: "asyncio.Task[Reply]", waiting: Caller) -> Reply:
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        waiting.has_gone = True
        task.add_done_callback(partial(_log_failure, method))
        raise


def _log_failure(method: str, task: asyncio.Task[Reply]) -> None:
    """Log the failure of a change that no client waits for any more."""
    if not task.cancelled() and (error := task.exception()) is not None:
        details = json.dumps(status.details_of(error)) if isinstance(error, Exception) else "-"
        log.warning("rpc=%s: failed after its client went away error=%s", method, details)


class _Call:
    """A call from its arrival to its line in the log."""

    def __init__(self, method: str, request: Message, observe: Observe) -> None:
        self._method = method
        self._request = request
        self._observe = observe
        self._began = time.perf_counter()

    def end(
        self,
        code: grpc.StatusCode,
        level: int,
        details: str = "",
        defect: Exception | None = None,
    ) -> None:
        seconds = time.perf_counter() - self._began
        self._observe(self._method, code.name, seconds)
        if not log.isEnabledFor(level):
            return
        line = f"rpc={self._method} code={code.name} ms={seconds * 1000:.1f}{_about(self._request)}"
        if details:
            line += f" error={json.dumps(details)}"
        log.log(level, "%s", line, exc_info=defect)


def _about(request: Any) -> str:
    """What a request is about, for the log: ids and names only."""
    fields = request.DESCRIPTOR.fields_by_name
    found = [
        (key.removesuffix("_id"), getattr(request, key))
        for key in ("pod_sandbox_id", "container_id")
        if key in fields
    ]
    if "config" in fields:
        found.append(("name", request.config.metadata.name))
    if "image" in fields:
        found.append(("image", request.image.image))
    return "".join(f" {key}={json.dumps(value)}" for key, value in found)
