"""A session of exec or attach: one process, its streams pumped between the wire and descriptors."""

import asyncio
import logging
import os
from contextlib import ExitStack, suppress
from functools import partial

from nodeagent.errors import NodeAgentError
from nodeagent.streaming.backend import AttachRequest, Backend, ExecRequest, Process
from nodeagent.streaming.pump import Sink, Source
from nodeagent.streaming.remotecommand import (
    Channel,
    Closed,
    Event,
    Input,
    InputEnded,
    Outcome,
    Resized,
    Wire,
)
from nodeagent.streaming.session import Session, Timeouts

log = logging.getLogger(__name__)


class CommandSession(Session[Event]):
    """A session that waits for the client's streams, starts the process, carries its bytes, and reports its end."""

    def __init__(
        self,
        wire: Wire,
        request: ExecRequest | AttachRequest,
        backend: Backend,
        timeouts: Timeouts,
    ) -> None:
        super().__init__(wire, timeouts)
        self._wire: Wire = wire
        self._request = request
        self._backend = backend
        self._ready = asyncio.Event()
        self._sized = asyncio.Event()
        self._size: tuple[int, int] | None = None
        self._process: Process | None = None
        self._stdin = Sink(self.backlog)
        self._stdin_ended = False

    async def serve(self, early: bytes) -> None:
        self.listen(early)
        try:
            async with asyncio.timeout(self.timeouts.creation_s):
                await self._ready.wait()
        except TimeoutError:
            log.warning(
                "%s: a client did not open its streams in time; its connection is closed",
                self._request.path,
            )
            return
        self._wire.finish(await self._outcome())

    # --- what the client does ---

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._wire.ready:
            self._ready.set()

    def handle(self, event: Event) -> None:
        match event:
            case Input(data):
                self._stdin.write(data)
            case InputEnded():
                self._stdin_ended = True
                self._stdin.end()
            case Resized(width, height):
                self._resize(width, height)
            case Closed():
                self.leave()

    def explain(self, reason: str) -> None:
        self._wire.finish(Outcome(message=f"{self._request.path}: {reason}"))

    def _resize(self, width: int, height: int) -> None:
        self._size = (width, height)
        self._sized.set()
        if self._process is not None:
            with suppress(OSError):
                self._process.resize(width, height)

    # --- what the process does ---

    async def _outcome(self) -> Outcome:
        try:
            process = await self._start()
            try:
                return Outcome(exit_code=await self._pump(process))
            finally:
                self._process = (
                    None  # first: the client may still resize a terminal that is gone after this
                )
                await process.close()
        except (NodeAgentError, OSError) as error:  # a TimeoutError is an OSError
            return Outcome(message=str(error))
        except Exception:
            log.exception(
                '%s in container "%s" failed', self._request.path, self._request.container_id
            )
            return Outcome(message="internal error of the node agent")

    async def _start(self) -> Process:
        """Start the process with the client's size of the terminal, or give it that size when it is known."""
        if isinstance(self._request, AttachRequest):
            size, process = None, await self._backend.attach(self._request)
        else:
            size = await self._first_size()
            process = await self._backend.exec(self._request, size)
        self._process = process
        if self._size is not None and self._size != size:
            self._resize(*self._size)
        return process

    async def _first_size(self) -> tuple[int, int] | None:
        if self._request.tty:
            with suppress(TimeoutError):
                async with asyncio.timeout(self.timeouts.first_size_s):
                    await self._sized.wait()
        return self._size

    async def _pump(self, process: Process) -> int:
        """Carry bytes until the process has ended and its output is on the wire; return the exit code."""
        # Unwound in reverse: the loop must not watch a descriptor that is closed, and whose number may be used again.
        with ExitStack() as held:
            self._open_stdin(process)
            held.callback(self._stdin.discard)
            sources = []
            for channel, fd in ((Channel.STDOUT, process.stdout), (Channel.STDERR, process.stderr)):
                if fd is not None:
                    held.callback(os.close, fd)
                    sources.append(Source(fd, self.flow, partial(self._output, channel)))
                    held.callback(sources[-1].close)
            code = await process.wait()
            await self._last_output(sources)
            return code

    def _open_stdin(self, process: Process) -> None:
        fd = process.stdin
        if fd is None:
            self._stdin.discard()
            return

        def end() -> None:
            os.close(fd)
            if self._stdin_ended:
                process.end_stdin()

        self._stdin.open(fd, end)

    def _output(self, channel: Channel, data: bytes) -> None:
        self._wire.send(channel, data)
        self.flush()

    async def _last_output(self, sources: list[Source]) -> None:
        """Wait a moment for others that hold the ended process's output; then read what is there, and no more."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self.timeouts.last_output_s):
                await _all_ended(sources)
        for source in sources:
            source.finish()
        await _all_ended(sources)


async def _all_ended(sources: list[Source]) -> None:
    for source in sources:
        await source.ended.wait()
