"""Clients of the streaming server: HTTP by hand, SPDY by its own core, WebSocket by the library's.

All read only when they are told to, so a test decides about the pace.
"""

import asyncio
import json
import ssl
import struct
from abc import ABC, abstractmethod
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from websockets.frames import Frame, Opcode
from websockets.protocol import Protocol as WebSocketProtocol
from websockets.protocol import Side

from nodeagent.streaming import spdy
from nodeagent.streaming.backend import CommandRequest
from nodeagent.streaming.remotecommand import Channel, channels
from nodeagent.streaming.spdy_frames import Reset

READ_BYTES = 1 << 18

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class NotUpgraded(Exception):
    """The server refused."""

    def __init__(self, status: int, head: str, body: str) -> None:
        super().__init__(f"{status}: {body}")
        self.status = status
        self.head = head
        self.body = body


async def upgrade(
    url: str, method: str, headers: list[tuple[str, str]], tls: ssl.SSLContext | None = None
) -> tuple[str, Streams]:
    """The head of the answer 101, and the connection."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(
        parts.hostname, parts.port, ssl=tls, limit=READ_BYTES
    )
    lines = [f"{method} {parts.path} HTTP/1.1", f"Host: {parts.netloc}"]
    lines += [f"{name}: {value}" for name, value in headers]
    try:
        writer.write("\r\n".join([*lines, "", ""]).encode())
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        status = int(head.split()[1])
        if status != 101:
            raise NotUpgraded(status, head, (await reader.read()).decode())
    except BaseException:
        await hang_up(writer)
        raise
    return head, (reader, writer)


async def upgrade_to_spdy(url: str, *protocols: str, tls: ssl.SSLContext | None = None) -> Streams:
    headers = [("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1")]
    headers += [("X-Stream-Protocol-Version", protocol) for protocol in protocols]
    return (await upgrade(url, "POST", headers, tls))[1]


async def upgrade_to_websocket(
    url: str, protocol: str, tls: ssl.SSLContext | None = None
) -> Streams:
    headers = [
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", "B3TLitF/japKAlbm5ZdP6w=="),
    ]
    if protocol:
        headers.append(("Sec-WebSocket-Protocol", protocol))
    return (await upgrade(url, "GET", headers, tls))[1]


async def hang_up(writer: asyncio.StreamWriter) -> None:
    writer.close()
    try:
        await writer.wait_closed()
    except (ConnectionError, ssl.SSLError):
        pass


class Client(ABC):
    """A connection behind its upgrade."""

    def __init__(self, streams: Streams) -> None:
        self.reader, self.writer = streams

    @abstractmethod
    def data_to_send(self) -> list[bytes]: ...

    @abstractmethod
    def take(self, data: bytes) -> None:
        """Understand what the server has sent."""

    async def flush(self) -> None:
        self.writer.write(b"".join(self.data_to_send()))
        await self.writer.drain()

    async def more(self) -> bool:
        """Read once; False at the end of the connection."""
        data = await self.reader.read(READ_BYTES)
        if data:
            self.take(data)
            await self.flush()
        return bool(data)

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert await self.more(), "the server has closed"

    async def close(self) -> None:
        await hang_up(self.writer)


class WebSocket:
    """The client's end."""

    def __init__(self) -> None:
        self.protocol = WebSocketProtocol(Side.CLIENT, max_size=None)

    def receive(self, data: bytes) -> list[bytes]:
        """Whole messages."""
        self.protocol.receive_data(data)
        return [
            bytes(event.data)
            for event in self.protocol.events_received()
            if isinstance(event, Frame) and event.opcode in (Opcode.TEXT, Opcode.BINARY)
        ]


# --- exec and attach ---


@dataclass(frozen=True)
class Result:
    stdout: bytes
    stderr: bytes
    status: Any

    @property
    def code(self) -> int:
        """The exit code that a metav1.Status tells."""
        if self.status["status"] == "Success":
            return 0
        assert self.status["reason"] == "NonZeroExitCode"
        (cause,) = self.status["details"]["causes"]
        return int(cause["message"])


class CommandClient(Client):
    """Somebody at a keyboard, over either wire."""

    can_end_input: bool

    def __init__(self, streams: Streams) -> None:
        super().__init__(streams)
        self.received = {channel: bytearray() for channel in Channel}

    @abstractmethod
    def put(self, channel: Channel, data: bytes) -> None: ...

    @abstractmethod
    def put_end(self) -> None: ...

    async def write(self, data: bytes) -> None:
        self.put(Channel.STDIN, data)
        await self.flush()

    async def write_all(self, data: bytes, size: int = 32 << 10) -> None:
        """Write in messages of a size, then end the input."""
        for start in range(0, len(data), size):
            await self.write(data[start : start + size])
        await self.end_input()

    async def end_input(self) -> None:
        self.put_end()
        await self.flush()

    async def resize(self, width: int, height: int) -> None:
        self.put(Channel.RESIZE, json.dumps({"Width": width, "Height": height}).encode())
        await self.flush()

    async def expect(self, text: bytes, channel: Channel = Channel.STDOUT) -> None:
        """Read until this has come, and drop it with all before it."""
        await self.until(lambda: text in self.received[channel])
        _, _, self.received[channel][:] = self.received[channel].partition(text)

    async def result(self) -> Result:
        """Read to the end of the connection."""
        while await self.more():
            pass
        await self.close()
        status = bytes(self.received[Channel.ERROR])
        return Result(
            bytes(self.received[Channel.STDOUT]),
            bytes(self.received[Channel.STDERR]),
            json.loads(status) if status.startswith(b"{") else status.decode(),
        )


class SpdyCommand(CommandClient):
    can_end_input = True

    def __init__(self, streams: Streams, request: CommandRequest) -> None:
        super().__init__(streams)
        self.spdy = spdy.Connection(client=True)
        self.streams: dict[Channel, int] = {}
        self.ended: list[Channel] = []
        for channel in sorted(channels(request), key=lambda c: c is not Channel.ERROR):
            self.streams[channel] = self.spdy.open({"streamtype": channel.name.lower()})

    def data_to_send(self) -> list[bytes]:
        return self.spdy.data_to_send()

    def put(self, channel: Channel, data: bytes) -> None:
        self.spdy.send_data(self.streams[channel], data)

    def put_end(self) -> None:
        self.spdy.end(self.streams[Channel.STDIN])

    def take(self, data: bytes) -> None:
        names = {stream: channel for channel, stream in self.streams.items()}
        for event in self.spdy.receive_data(data):
            match event:
                case spdy.DataReceived(stream, part):
                    self.received[names[stream]] += part
                case spdy.StreamEnded(stream):
                    self.ended.append(names[stream])
                case spdy.Failed(reason):
                    raise AssertionError(reason)


class WebSocketCommand(CommandClient):
    def __init__(self, streams: Streams, protocol: str) -> None:
        super().__init__(streams)
        self.socket = WebSocket()
        self.base64 = "base64" in protocol
        self.can_end_input = protocol.startswith("v5")

    def data_to_send(self) -> list[bytes]:
        return self.socket.protocol.data_to_send()

    def put(self, channel: Channel, data: bytes) -> None:
        if self.base64:
            self.socket.protocol.send_text(b"%d%b" % (channel, b64encode(data)))
        else:
            self.socket.protocol.send_binary(bytes([channel]) + data)

    def put_end(self) -> None:
        self.socket.protocol.send_binary(b"\xff\x00")

    def take(self, data: bytes) -> None:
        for message in self.socket.receive(data):
            if self.base64:
                self.received[Channel(int(message[:1]))] += b64decode(message[1:])
            else:
                self.received[Channel(message[0])] += message[1:]


COMMAND_WIRES = [
    "spdy v4.channel.k8s.io",
    "spdy v3.channel.k8s.io",
    "spdy v2.channel.k8s.io",
    "spdy channel.k8s.io",
    "websocket v5.channel.k8s.io",
    "websocket v4.channel.k8s.io",
    "websocket v4.base64.channel.k8s.io",
    "websocket channel.k8s.io",
    "websocket ",
]


async def connect_command(
    wire: str, url: str, request: CommandRequest, tls: ssl.SSLContext | None = None
) -> CommandClient:
    kind, _, protocol = wire.partition(" ")
    client: CommandClient
    if kind == "spdy":
        client = SpdyCommand(await upgrade_to_spdy(url, protocol, tls=tls), request)
    else:
        client = WebSocketCommand(await upgrade_to_websocket(url, protocol, tls), protocol)
    await client.flush()
    return client


# --- port-forward ---


@dataclass
class Forwarded:
    """What a client has of one connection."""

    data: bytearray = field(default_factory=bytearray)
    error: bytearray = field(default_factory=bytearray)
    ended: bool = False
    reset: bool = False
    over: bool = False  # its error stream has ended


class ForwardClient(Client):
    """Somebody with connections to ports of a pod, over either wire."""

    def __init__(self, streams: Streams) -> None:
        super().__init__(streams)
        self.connections: dict[int, Forwarded] = {}

    @abstractmethod
    def connect(self, port: int) -> int:
        """A connection's number."""

    @abstractmethod
    def put(self, connection: int, data: bytes) -> None: ...

    async def write(self, connection: int, data: bytes) -> None:
        self.put(connection, data)
        await self.flush()

    async def expect(self, connection: int, data: bytes) -> None:
        """Read until exactly this has come."""
        received = self.connections[connection].data
        await self.until(lambda: len(received) >= len(data))
        assert received == data
        received.clear()


class SpdyForward(ForwardClient):
    def __init__(self, streams: Streams, *, tunnel: bool) -> None:
        super().__init__(streams)
        self.spdy = spdy.Connection(client=True)
        self.socket = WebSocket() if tunnel else None
        self._errors: dict[int, int] = {}

    def data_to_send(self) -> list[bytes]:
        data = self.spdy.data_to_send()
        if self.socket is None:
            return data
        if data:
            self.socket.protocol.send_binary(b"".join(data))
        return self.socket.protocol.data_to_send()

    def connect(self, port: int) -> int:
        headers = {"port": str(port), "requestid": str(len(self.connections))}
        error = self.spdy.open({"streamtype": "error"} | headers)
        self.spdy.end(error)
        connection = self.spdy.open({"streamtype": "data"} | headers)
        self.connections[connection] = Forwarded()
        self._errors[error] = connection
        return connection

    def put(self, connection: int, data: bytes) -> None:
        self.spdy.send_data(connection, data)

    async def end(self, connection: int) -> None:
        self.spdy.end(connection)
        await self.flush()

    async def abort(self, connection: int) -> None:
        self.spdy.reset(connection, Reset.CANCEL)
        await self.flush()

    def take(self, data: bytes) -> None:
        for part in [data] if self.socket is None else self.socket.receive(data):
            for event in self.spdy.receive_data(part):
                self._note(event)

    def _note(self, event: spdy.Event) -> None:
        match event:
            case spdy.DataReceived(stream, data) if stream in self._errors:
                self.connections[self._errors[stream]].error += data
            case spdy.DataReceived(stream, data):
                self.connections[stream].data += data
            case spdy.StreamEnded(stream) if stream in self._errors:
                self.connections[self._errors[stream]].over = True
            case spdy.StreamEnded(stream):
                self.connections[stream].ended = True
            case spdy.StreamReset(stream) if stream in self.connections:
                self.connections[stream].reset = True
            case spdy.StreamReset(stream) | spdy.Failed(stream):
                raise AssertionError(event)


class ChannelForward(ForwardClient):
    """Ports are the request's; connections are known by their place in it."""

    def __init__(self, streams: Streams) -> None:
        super().__init__(streams)
        self.socket = WebSocket()

    def data_to_send(self) -> list[bytes]:
        return self.socket.protocol.data_to_send()

    def connect(self, port: int) -> int:
        number = len(self.connections)
        self.connections[number] = Forwarded(data=bytearray(), error=bytearray())
        return number

    def put(self, connection: int, data: bytes) -> None:
        self.socket.protocol.send_binary(bytes([2 * connection]) + data)

    def take(self, data: bytes) -> None:
        for message in self.socket.receive(data):
            number, is_error = divmod(message[0], 2)
            connection = self.connections[number]
            (connection.error if is_error else connection.data).extend(message[1:])


FORWARD_WIRES = ["spdy", "tunnel", "channels"]


async def connect_forward(wire: str, url: str) -> ForwardClient:
    if wire == "spdy":
        return SpdyForward(await upgrade_to_spdy(url, "portforward.k8s.io"), tunnel=False)
    if wire == "tunnel":
        streams = await upgrade_to_websocket(url, "SPDY/3.1+portforward.k8s.io")
        return SpdyForward(streams, tunnel=True)
    return ChannelForward(await upgrade_to_websocket(url, "v4.channel.k8s.io"))


def greeting(port: int) -> bytes:
    """How a legacy channel begins."""
    return struct.pack("<H", port)
