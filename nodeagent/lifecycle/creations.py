"""Creations, and starts, that outlive their callers.

A creation whose caller gave up goes on; the retry, which comes with the same key, joins it or gets its result. Nothing
is made twice, and nothing is left over that no caller asks for again (the "name is reserved" loops of a busy node).
One that takes long tells its caller what it waits for, before the caller gives up by itself and knows nothing.
`images.concurrency.SharedWork` has the opposite rule: a pull ends with its last caller.
"""

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from nodeagent.errors import Unavailable
from nodeagent.tasks import Tasks, caller

# The kubelet waits 120 s, and 240 s for a pod (runtimeRequestTimeout, and twice that).
PATIENCE_SECONDS = 110.0


def _nothing_known() -> str:
    return ""


@dataclass(slots=True)
class _Stage:
    """What a creation does now. why: what holds it up, "" where nothing is known of that."""

    text: str = "it has just begun"
    why: Callable[[], str] = _nothing_known

    def __str__(self) -> str:
        why = self.why()
        return f"{self.text}: {why}" if why else self.text


_stage: ContextVar[_Stage] = ContextVar("stage")


def doing(text: str, why: Callable[[], str] = _nothing_known) -> None:
    """Note what the creation, if the caller is part of one, does or waits for from now on.

    why: finds out what holds it up, for a caller who has waited long enough.
    """
    if stage := _stage.get(None):
        stage.text, stage.why = text, why


class Creations:
    """At most one creation per key, which goes on without its callers; each makes an object and returns its id.

    name: of the tasks. exists: whether an object whose id reached no caller is still there for a retry. patience_s: the
    time after which a caller is told what the creation waits for. done: what has not been done by then, for the text.
    """

    def __init__(
        self,
        tasks: Tasks,
        name: str,
        exists: Callable[[str], bool],
        patience_s: float = PATIENCE_SECONDS,
        done: str = "made",
    ) -> None:
        self._owner = tasks.part()
        self._name = name
        self._exists = exists
        self._patience_s = patience_s
        self._done = done
        self._tasks: dict[Hashable, asyncio.Task[str]] = {}
        self._stages: dict[asyncio.Task[str], _Stage] = {}

    async def join(
        self, key: Hashable, what: str, make: Callable[[], Coroutine[Any, Any, str]]
    ) -> str:
        """Start or join the creation under `key`, and return its id; a cancelled caller leaves it running.

        The id is kept for a retry where the caller has gone, though whoever calls this waits until the end. Raises
        TimeoutError when that takes long; the creation goes on.
        """
        self._drop_unclaimed()
        task = self._tasks.get(key)
        if task is None:
            stage = _Stage()
            task = self._owner.start(self._name, _staged(stage, make), about=what)
            task.add_done_callback(lambda done: self._settle(key, done))
            self._tasks[key], self._stages[task] = task, stage
        try:
            done, _ = await asyncio.wait([task], timeout=self._patience_s)
            if not done:
                raise TimeoutError(
                    f"{what}: not {self._done} within {self._patience_s:g} s, it goes on, and a retry joins it: "
                    f"{self._stages[task]}"
                )
            result = await asyncio.shield(task)
        except asyncio.CancelledError:
            # Either the caller was cancelled, or the creation itself, by a stop of its pod or of the agent.
            if task.cancelled():
                raise Unavailable(
                    f"{what}: cut off, as its pod or the agent is being stopped"
                ) from None
            raise
        if not caller.get().has_gone:
            self._tasks.pop(key, None)
        return result

    def _settle(self, key: Hashable, task: asyncio.Task[str]) -> None:
        self._stages.pop(task, None)
        if _has_failed(task) and self._tasks.get(key) is task:
            del self._tasks[key]

    def _drop_unclaimed(self) -> None:
        for key, task in list(self._tasks.items()):
            # One that has failed a moment ago is not settled yet, and its error is nobody's here.
            if task.done() and not _has_failed(task) and not self._exists(task.result()):
                del self._tasks[key]

    async def close(self) -> None:
        """Cancel what is under way; each undoes itself."""
        await self._owner.close()


async def _staged(stage: _Stage, make: Callable[[], Coroutine[Any, Any, str]]) -> str:
    _stage.set(stage)
    return await make()


def _has_failed(task: asyncio.Task[str]) -> bool:
    return task.cancelled() or task.exception() is not None
