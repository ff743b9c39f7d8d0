"""Faults of background work, and time that does not pass between its attempts."""

import asyncio
import math
import sqlite3
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

import pytest

from nodeagent.tasks import Tasks

P = ParamSpec("P")
T = TypeVar("T")

ERRORS: dict[str, Callable[[], Exception]] = {
    "OSError": lambda: OSError(5, "Input/output error", "/a/file"),
    "KeyError": lambda: KeyError("id"),
    "DatabaseError": lambda: sqlite3.DatabaseError("database disk image is malformed"),
}
any_error = pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS.keys())


class Fault:
    """Makes functions fail, for so many calls of any of them: none until it is told."""

    def __init__(self, error: Callable[[], Exception]) -> None:
        self._error = error
        self._left = 0.0

    def once(self) -> None:
        self._left = 1

    def for_ever(self) -> None:
        self._left = math.inf

    def stop(self) -> None:
        self._left = 0

    def strike(self) -> None:
        """Raise, if it is time to."""
        if self._left:
            self._left -= 1
            raise self._error()

    def before(self, function: Callable[P, T]) -> Callable[P, T]:
        """The function, unless it is to fail."""

        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            self.strike()
            return function(*args, **kwargs)

        return call

    def before_async(self, function: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
        async def call(*args: P.args, **kwargs: P.kwargs) -> T:
            self.strike()
            return await function(*args, **kwargs)

        return call


def impatient_tasks() -> Tasks:
    """Tasks without a pause after a failure."""
    return Tasks(sleep=lambda _: asyncio.sleep(0))


async def until(condition: Callable[[], object]) -> None:
    """Return once it holds; what it is about is in another task, or in a thread."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 nobody else tells
            await asyncio.sleep(0.001)
