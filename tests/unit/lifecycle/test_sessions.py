"""What a streaming session leaves when something fails."""

import asyncio
import os
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nodeagent.errors import NotFound, Unavailable
from nodeagent.lifecycle.sessions import Attached, Command, Sessions, _pipes
from nodeagent.sandbox.agent.client import AttachIO, ExecHandle, Supervisor
from nodeagent.streaming.backend import AttachRequest
from nodeagent.tasks import Tasks


def test_no_pipe_is_left_where_there_cannot_be_all(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = os.pipe2

    def pipe2(flags: int) -> tuple[int, int]:
        if len(made) == 4:
            raise OSError(24, "Too many open files")
        made.extend(real(flags))
        return made[-2], made[-1]

    monkeypatch.setattr(os, "pipe2", pipe2)
    with pytest.raises(OSError, match="Too many open files"):
        _pipes((True, True, True))
    assert len(made) == 4
    for descriptor in made:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


class Ended:
    """A process that has ended, as its handle and its supervisor tell."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def resize(self, *_: Any) -> None:
        raise NotFound("ended")


@pytest.mark.parametrize("kind", ["exec", "attach"])
async def test_a_resize_after_the_end_is_no_fault(kind: str) -> None:
    faults: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
    nothing = cast(Any, None)
    sessions = Sessions(nothing, nothing, nothing, nothing, Tasks())
    process: Command | Attached = Command(sessions, cast(ExecHandle, Ended()), None, None, None)
    if kind == "attach":
        request = AttachRequest(container_id="id", stdin=False, stdout=True, stderr=False, tty=True)
        streams = AttachIO(None, None, None, lambda: None, lambda: None)
        process = Attached(
            sessions, cast(Supervisor, Ended()), request, streams, input_ends_once=False
        )
    process.resize(80, 24)
    for _ in range(10):
        await asyncio.sleep(0)
    await sessions.close()
    assert faults == []


class Supervision:
    """The supervision of a container that runs until `end`."""

    def __init__(self) -> None:
        self.end = asyncio.Event()

    async def ended(self, _container_id: str) -> None:
        await self.end.wait()


@pytest.mark.parametrize("ends_with_it", [False, True])
async def test_who_is_attached_hears_of_the_loss_of_the_supervisor(ends_with_it: bool) -> None:
    """The container may go on for days, and nothing of it would come any more."""
    supervisor, supervision = Ended(), Supervision()
    record = SimpleNamespace(exit_code=7)
    inventory = SimpleNamespace(containers={"id": record})
    nothing = cast(Any, None)
    sessions = Sessions(cast(Any, inventory), nothing, nothing, cast(Any, supervision), Tasks())
    request = AttachRequest(container_id="id", stdout=True)
    streams = AttachIO(None, None, None, lambda: None, lambda: None)
    attached = Attached(
        sessions, cast(Supervisor, supervisor), request, streams, input_ends_once=False
    )
    waiting = Tasks().start("waiting", attached.wait())
    await asyncio.sleep(0)
    supervisor.ended.set()
    if ends_with_it:
        asyncio.get_running_loop().call_later(0.1, supervision.end.set)
        assert await waiting == 7
    else:
        with pytest.raises(Unavailable, match="has ended; attach again"):
            await waiting
    await sessions.close()
