"""A registry whose behaviour a test decides: it serves images from memory, and can do what no good registry does."""

from __future__ import annotations

import gzip
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web

from tests.support import images, tars
from tests.support.images import Image, Layer
from tests.support.tars import Member

Handler = Callable[[web.Request], Awaitable[web.StreamResponse | None]]


@dataclass(slots=True)
class Server:
    """host: as in a reference. hooks: asked first, in their order, for every request."""

    host: str = ""
    scheme: str = "http"
    contents: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    hooks: list[Handler] = field(default_factory=list)
    requests: list[web.Request] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.host}"

    def add(self, image: Image) -> str:
        """Serve the image; returns its digest."""
        base = f"/v2/{image.repository}"
        for blob in image.blobs():
            self.contents[f"{base}/blobs/{images.digest(blob)}"] = blob, "application/octet-stream"
        top, top_type = image.top()
        manifests = [(data, image.media.manifest) for data in image.manifests()]
        for data, media_type in [*manifests, (top, top_type)]:
            self.contents[f"{base}/manifests/{images.digest(data)}"] = data, media_type
        for tag in image.tags:
            self.contents[f"{base}/manifests/{tag}"] = top, top_type
        return images.digest(top)

    def asked(self, part: str) -> list[web.Request]:
        """The requests so far whose path has this part."""
        return [request for request in self.requests if part in request.path]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        for hook in self.hooks:
            response = await hook(request)
            if response is not None:
                return response
        if request.path not in self.contents:
            return web.json_response({"errors": [{"code": "UNKNOWN", "message": "no"}]}, status=404)
        return self.answer(request)

    def answer(self, request: web.Request) -> web.Response:
        """What is there, from where it is asked for."""
        data, media_type = self.contents[request.path]
        start = request.http_range.start or 0
        headers = {"Content-Type": media_type}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return web.Response(body=data[start:], status=206 if start else 200, headers=headers)


@asynccontextmanager
async def serving(
    tls: ssl.SSLContext | None = None, *, address: str = "127.0.0.1"
) -> AsyncIterator[Server]:
    server = Server(scheme="https" if tls else "http")
    application = web.Application(client_max_size=1 << 30)
    application.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(
        application, access_log=None, shutdown_timeout=0, handler_cancellation=True
    )
    await runner.setup()
    await web.TCPSite(runner, address, 0, ssl_context=tls).start()
    server.host = f"{address}:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()


async def send_part(
    request: web.Request, data: bytes, size: int, headers: Mapping[str, str] | None = None
) -> web.StreamResponse:
    """Announce all of the data, send some of it."""
    response = web.StreamResponse(headers=headers)
    response.content_length = len(data)
    await response.prepare(request)
    await response.write(data[:size])
    return response


def layer(*members: Member) -> Layer:
    """A layer of members made by `tests.support.tars`."""
    tar = tars.archive(*members)
    return Layer(gzip.compress(tar, 1, mtime=0), tars.digest(tar))


def image(*layers: Layer, repository: str = "test/image", tag: str = "1") -> Image:
    return Image(repository, (tag,), layers, indexed=False)
