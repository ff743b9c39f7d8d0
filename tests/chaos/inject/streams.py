"""Clients of Exec, Attach and PortForward: what comes over the connection that a URL leads to.

A stream that fails is a `Failed`, which is judged and repeated as the failure of a call is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import grpc

from nodeagent.streaming.backend import AttachRequest, ExecRequest
from tests.chaos.inject.world import Wrong
from tests.contract.streaming.clients import (
    CommandClient,
    ForwardClient,
    NotUpgraded,
    Result,
    connect_command,
    connect_forward,
)

# What the kubelet uses, and what a client of a newer contract does: the two have a code of their own in the agent.
SPDY, WEBSOCKET = "spdy v4.channel.k8s.io", "websocket v5.channel.k8s.io"

_DEFECT = "internal error of the node agent"  # which names nothing, so that it is not a clear text

T = TypeVar("T")


class Failed(grpc.RpcError):
    """A stream that failed, with what a client knows of it."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self._code = code
        self._details = details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details


def command(
    wire: str,
    url: str,
    request: ExecRequest | AttachRequest,
    seconds: float,
    talk: Callable[[CommandClient], Awaitable[None]] | None = None,
) -> Result:
    """Connect, say what `talk` says, and read to the end. Raises Failed; a Result has the status of a process."""

    async def play() -> Result:
        client = await connect_command(wire, url, request)
        try:
            if talk is not None:
                await _until_over(client, talk)
            return await client.result()
        finally:
            client.writer.close()

    result = _played(play(), seconds)
    if not result.status:
        raise _broken()
    if result.status["status"] == "Failure" and result.status["reason"] != "NonZeroExitCode":
        raise _failure(str(result.status["message"]))
    return result


def forward(url: str, port: int, request: bytes, seconds: float) -> bytes:
    """What a server in the pod answers to a request, up to the end of the connection. Raises Failed."""

    async def play() -> bytes:
        client = await connect_forward("spdy", url)
        try:
            number = client.connect(port)
            await client.write(number, request)
            return await _answer(client, number)
        finally:
            client.writer.close()

    return _played(play(), seconds)


async def _answer(client: ForwardClient, number: int) -> bytes:
    connection = client.connections[number]
    while not (connection.ended or connection.reset or connection.error):
        if not await client.more():
            raise _broken()
    if connection.error:
        raise _failure(connection.error.decode())
    if connection.reset:
        raise _broken()
    return bytes(connection.data)


async def _until_over(
    client: CommandClient, talk: Callable[[CommandClient], Awaitable[None]]
) -> None:
    """Talk, unless the server closes meanwhile: then it has said why, or the connection is broken."""
    try:
        await talk(client)
    except AssertionError:
        pass


def _played(play: Awaitable[T], seconds: float) -> T:
    async def within() -> T:
        async with asyncio.timeout(seconds):
            return await play

    try:
        return asyncio.run(within())
    except TimeoutError:
        raise Failed(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded") from None
    except NotUpgraded as refusal:
        raise Failed(grpc.StatusCode.UNAVAILABLE, str(refusal)) from None
    except (OSError, EOFError):  # reset, refused, or closed before an answer
        raise _broken() from None


def _failure(message: str) -> Failed:
    if message == _DEFECT:
        raise Wrong(f"a stream: {message}")
    return Failed(grpc.StatusCode.INTERNAL, message)


def _broken() -> Failed:
    return Failed(grpc.StatusCode.ABORTED, "the connection has ended without a status")
